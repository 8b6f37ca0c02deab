#!/usr/bin/env bash
# The kernels' tests and benchmark on the GPU of this machine. Nothing is installed and nothing fetched.
#   PYTHON  an interpreter that has torch with CUDA or ROCm, and triton (python3)
#   WHEELS  a folder of wheels with what else is missing, unpacked for as long as this runs
#   JSON    where the benchmark writes its numbers (runs/kernels.json)
#   ONLY    tests or bench: one half of it, where a command may run for ten minutes only
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD" "$site/baton"
if [[ -n ${WHEELS:-} ]]; then
    find "$WHEELS" -maxdepth 1 -name '*.whl' -exec "$python" -m zipfile -e {} "$site" \;
fi
export PYTHONSAFEPATH=1 PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

"$python" - <<'END'
import importlib
import shutil
import sys

missing = []
for name in ["torch", "triton", "numpy", "pydantic", "yaml", "typer", "rich.console", "pytest"]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(error.name or name)
if missing:
    sys.exit(f"make gpu: {sys.executable} lacks {', '.join(missing)}; put wheels of them into a folder: make gpu WHEELS=FOLDER")
if not any(map(shutil.which, ["cc", "gcc", "clang"])):
    sys.exit("make gpu: there is no C compiler, with which triton builds what launches kernels")

import torch
import triton

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"make gpu: torch is {torch.__version__}, needed: 2.11 or newer")
if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} finds no GPU")
sys.stdout.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
END

# The benchmark runs also where a test fails or hangs: a GPU is rarely at hand.
status=0
if [[ ${ONLY:-tests} == tests ]]; then
    timeout 400 "$python" -m pytest tests/kernels -m "not exhaustive" -p no:cacheprovider \
        --ignore tests/kernels/test_ahead_of_time.py --ignore tests/kernels/test_overflow.py || status=$?
fi
mkdir -p runs
if [[ ${ONLY:-bench} == bench ]]; then
    "$python" -m baton.launcher.cli bench kernels --json "${JSON:-runs/kernels.json}" || status=$?
fi
exit "$status"
