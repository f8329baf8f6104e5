#!/usr/bin/env bash
# accelerate 1.15.0: on a CPU, `accelerate launch --cpu --num_processes 2` starts one process, and says nothing of it.
#
# With every option given, so that no default is guessed, the script runs once, without RANK and WORLD_SIZE; it takes
# itself for the only process and does all of the work. torchrun with the same number starts two. (Several CPU
# processes need mpirun and a configuration file of MULTI_CPU; several GPUs go through torchrun.)
#
# Exits 0 while it is so, 1 when the behaviour has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
cat > who.py <<'PYTHON'
import os

print("process", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), flush=True)
PYTHON
export HF_HOME="$folder" OMP_NUM_THREADS=1
venv/bin/accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no who.py \
    > accelerate.txt 2> words.txt
venv/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 who.py > torchrun.txt 2> /dev/null
echo "accelerate:" && cat accelerate.txt words.txt
echo "torchrun:" && sort torchrun.txt
[ "$(cat accelerate.txt)" = "process None of None" ] && [ ! -s words.txt ] && [ "$(wc -l < torchrun.txt)" = 2 ]
