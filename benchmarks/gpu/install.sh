#!/usr/bin/env bash
# Install what stage.sh has collected beside the machine's own packages: install.sh STAGED SITE
set -euo pipefail
rm -rf "$2"
"${PYTHON:-python3}" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile --target "$2" "$1"/wheels/*.whl
