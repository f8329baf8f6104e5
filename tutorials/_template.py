# %% [markdown]
# # Title
#
# text

# %%
# On Colab this installs the package and goes to its tutorials; elsewhere it does nothing.
import os
import shutil
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    SOURCE = "qkvnorm-lens"  # a release; or a repository's address: "git+https://..."
    pip = [sys.executable, "-m", "pip"]
    alone = ["--no-deps", "--no-binary=qkvnorm-lens"]
    subprocess.run([*pip, "download", "-q", *alone, "-d", "download", SOURCE], check=True)
    shutil.unpack_archive(next(Path("download").iterdir()), "source")
    folder = next(Path("source").iterdir()).resolve()
    subprocess.run([*pip, "install", "-q", f"{folder}[experiments]"], check=True)
    os.chdir(folder / "tutorials")
