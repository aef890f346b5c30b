"""`leansd ui`: a page to draw, compare, edit plans, tune and look back."""

from pathlib import Path

import typer

from leansd.cli.command import command, option
from leansd.cli.options import Device, complete_model
from leansd.cli.terminal import hush_libraries, note, show, warn
from leansd.errors import LeansdError

app = typer.Typer(add_completion=False)


@command(
    app,
    "ui",
    "leansd ui",
    "leansd ui --models ~/models --folder my-plans --port 7860",
    json=None,
)
def serve_page(
    model: str = option(
        "emoji",
        "The model that is open at first: emoji, a folder or a file.",
        autocompletion=complete_model,
    ),
    models: Path | None = option(
        None, "Folder of models to choose from; nothing outside it is opened."
    ),
    folder: Path = option(
        Path("leansd-ui"), "Folder for saved plans and the history; nothing else is written."
    ),
    host: str = option(
        "127.0.0.1", "Address to listen on; by default this machine alone can connect."
    ),
    port: int | None = option(
        None, "Port; the first free one from 7860 on by default.", min=1, max=65535
    ),
    share: bool = option(
        False,
        "Make the page public by gradio's tunnel: anybody with the link can draw here.",
        "--share",
    ),
    queue: int = option(8, "Runs that may wait; one runs at a time.", min=1, max=1000),
    device: Device = None,
) -> None:
    """Serve a page in the browser, on this machine only, until it is interrupted.

    Needs the extra: pip install 'leansd[ui]'
    """
    import os
    import threading
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise LeansdError("the page needs gradio: pip install 'leansd[ui]'")
    # Read when gradio is imported: it would call home otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from leansd.loading import find_device
    from leansd.ui.folders import Folders
    from leansd.ui.serving import Door, serving
    from leansd.ui.studio import Studio

    folders = Folders.open(folder, models, model)
    find_device(device)
    folders.find_model(model)
    hush_libraries()
    studio = Studio(folders, device)
    note(f"opening {model}")
    studio.open(model)
    with serving(studio, Door(host, port, share), limit=queue) as address:
        show(f"{address}  (Ctrl+C ends it)")
        note(f"plans and history in {folders.home}")
        if share or host not in ("127.0.0.1", "localhost", "::1"):
            warn("others can reach this page: they can draw here and see its history")
        threading.Event().wait()
