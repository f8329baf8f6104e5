"""``python -m qkvnorm_lens`` is the command ``qkvnorm-lens``."""

from __future__ import annotations

from qkvnorm_lens.cli import main

raise SystemExit(main())
