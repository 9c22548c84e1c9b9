#!/usr/bin/env bash
# A Chromium for test/test_report.py, which opens reports in it: one that is here, or else
# Debian's, which root may install, or else the one that Playwright downloads. Without any, the
# test says so and is skipped.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null && exit 0
done
mkdir -p build
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo '==> installing Chromium, to test reports with'
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } \
        >build/browser.log 2>&1 && exit 0
fi
timeout 300 .venv/bin/python -m playwright install chromium >>build/browser.log 2>&1 && exit 0
echo 'warning: no Chromium: test/test_report.py will skip what needs one (build/browser.log)' >&2
exit 0
