#!/usr/bin/env bash
# For owners of GPUs: checks and measures this machine in at most eight minutes, without network; see verify_gpu.py.
#   scripts/verify_gpu.sh          PYTHON=/path/to/python scripts/verify_gpu.sh --output mine.json
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-}"
if [ -z "$python" ]; then
    for candidate in .venv/bin/python python3; do
        if "$candidate" -c 'import torch, lightning, lazy_loader' 2>/dev/null; then python="$candidate"; break; fi
    done
fi
# Nothing that fits is installed: make installs it, which needs the network.
if [ -z "$python" ]; then make .venv/.installed; python=.venv/bin/python; fi
exec "$python" scripts/verify_gpu.py "$@"
