"""The pack on ComfyUI's own page, in a browser: `python tests/comfyui/browse.py --comfyui PATH`.

A server is started from the checkout with this pack alone, the example for the embedded model is
dropped onto the page as people do it, and Run is pressed. It passes when every node ran, the report
tells what was computed, and the page shows no error. Pictures of the page are left in DIR.

It wants ComfyUI's requirements, playwright, and a Chromium on PATH.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
NOT_RUN = "NOT RUN: there is no ComfyUI at {path} (main.py is missing)"
WIDE = {"width": 1600, "height": 1160}
PATIENCE = 600
"""Seconds, for the server to answer and for the workflow to end; a slow machine is no failure."""
DROP = """async ([name, encoded]) => {
    const bytes = Uint8Array.from(atob(encoded), (each) => each.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name, { type: "image/png" }));
    const target = document.querySelector("canvas");
    for (const kind of ["dragenter", "dragover", "drop"])
        target.dispatchEvent(
            new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: carried })
        );
}"""


@contextmanager
def serve(checkout: Path, home: Path) -> Iterator[str]:
    """ComfyUI with this pack and no other, its files in `home`; yields its address."""
    packs = home / "custom_nodes"
    packs.mkdir(parents=True)
    (packs / "lean-plan").symlink_to(PACK, target_is_directory=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "main.py", "--port", str(port), "--base-directory", str(home)]
    command += ["--disable-auto-launch", "--disable-api-nodes", *choose_device()]
    log = home / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=checkout, stdout=out, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(lambda: ask(f"{address}/system_stats"), server, log)
            yield address
        finally:
            server.terminate()
            server.wait()


def choose_device() -> list[str]:
    """ComfyUI's options for a machine without a GPU."""
    import torch

    return [] if torch.cuda.is_available() else ["--cpu"]


def ask(address: str) -> Any:
    """What the server answers; None where it does not yet."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)
    except OSError:
        return None


def wait_for(give: Any, server: subprocess.Popen[bytes], log: Path) -> Any:
    """The first answer that is one."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        if found := give():
            return found
        time.sleep(0.5)
    raise SystemExit(f"the server gave no answer:\n{log.read_text()[-2000:]}")


def browse(address: str, shots: Path) -> dict[str, Any]:
    """Drop the example onto the page, press Run, and return what the server tells of the run."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    example = PACK / "examples" / "embedded.png"
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--use-gl=swiftshader"]
        )
        page = browser.new_page(viewport=WIDE)
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: errors.append(error.stack or str(error)))
        page.goto(address)
        page.wait_for_function("window.app && window.app.graph && window.app.canvas")
        for closing in page.get_by_role("button", name="Close").all():
            closing.click()
        own = len(errors)  # of ComfyUI's page as it opens, whoever's packs there are
        page.evaluate(DROP, [example.name, base64.b64encode(example.read_bytes()).decode()])
        page.wait_for_function("window.app.graph._nodes.some((node) => node.type === 'LeanPlan')")
        page.wait_for_timeout(2000)
        page.screenshot(path=shots / "workflow.png")
        page.get_by_test_id("queue-button").click()
        until = time.monotonic() + PATIENCE
        while not (told := ask(f"{address}/history")) and time.monotonic() < until:
            page.wait_for_timeout(1000)
        page.wait_for_timeout(3000)
        page.screenshot(path=shots / "drawn.png")
        browser.close()
    if not told:
        raise SystemExit(f"the workflow did not end in {PATIENCE} s: see {shots}")
    (run,) = told.values()
    return {
        "errors": errors[own:],
        "status": run["status"]["status_str"],
        "outputs": run["outputs"],
    }


def main() -> int:
    """Say what was seen; 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--shots", type=Path, default=Path("runs/comfyui-page"))
    options = parser.parse_args()
    if not (options.comfyui / "main.py").is_file():
        print(NOT_RUN.format(path=options.comfyui))
        return 2
    options.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, serve(options.comfyui, Path(home)) as address:
        seen = browse(address, options.shots)
    print(json.dumps(seen, indent=2))
    return 0 if seen["status"] == "success" and seen["outputs"] and not seen["errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
