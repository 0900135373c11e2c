#!/bin/sh
# Print the best Python present that runs and can make environments: 3.12, then 3.13, then 3.11.
for version in 3.12 3.13 3.11; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python python3; do
        if "$candidate" -c "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" \
            2>/dev/null; then
            echo "$candidate"
            exit 0
        fi
    done
done
