"""`leansd anatomy`: where a UNet keeps its weights and spends its time."""

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: leansd anatomy sd15 --latent 64")
def show_anatomy(
    model: Annotated[
        str,
        typer.Argument(
            help="emoji, a model folder, a .safetensors file, a hub id, or the bare shape of "
            "sd15, sd21-base or sdxl."
        ),
    ] = "emoji",
    latent: Annotated[
        int | None, typer.Option(min=1, help="Side of the latents; the model's own by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Text tokens.")] = 77,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one line of JSON holding every row.")
    ] = False,
) -> None:
    """Show a UNet as a tree of blocks, layers and units, with parameters and MACs."""
    from dataclasses import asdict

    from leansd.faces.cli.terminal import hush_libraries, show_json, show_text
    from leansd.faces.outlines import open_anatomy

    hush_libraries()
    anatomy = open_anatomy(model, latent=latent, tokens=tokens)
    show_text(str(anatomy))
    if as_json:
        show_json(
            {
                "command": "anatomy",
                "model": model,
                "units": len(anatomy.units) - 2,
                "ends": 2,
                "params": anatomy.params,
                "macs": anatomy.macs,
                "latent": anatomy.size,
                "tokens": anatomy.tokens,
                "fingerprint": anatomy.fingerprint,
                "rows": [asdict(unit) for unit in anatomy],
            }
        )
