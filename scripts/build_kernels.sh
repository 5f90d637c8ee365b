#!/usr/bin/env bash
# Builds every CUDA C++ kernel with nvcc, so that training and inference start without compiling:
#
#   ./scripts/build_kernels.sh
#
# It is not needed: NVRTC compiles a kernel that is not built, at its first use. A second run builds nothing.
# Environment variables: DSV3_KERNEL_CACHE (the folder of the kernels, default ~/.cache/deepseek_v3/kernels),
# CUDA_HOME (the toolkit whose nvcc is used), PYTHON (default .venv/bin/python where it exists, or python3).

set -euo pipefail

refuse() {
    echo "error: $*" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([[ -x $root/.venv/bin/python ]] && echo "$root/.venv/bin/python" || echo python3)}
command -v "$python" >/dev/null || refuse "$python: no such Python; run \`make install\`, or name one in PYTHON"
"$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, ("torch", "typer"))))' ||
    refuse "$python has no torch; run \`make install\`, or name another Python in PYTHON"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m deepseek_v3.ops.build_kernels "$@"
