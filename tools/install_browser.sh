#!/usr/bin/env bash
# Chromium for the test of trace pages, where Debian's packages can be installed; prints its path, or nothing.
set -euo pipefail
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! browser && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    (apt-get update && apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 || true
    browser || true
fi
