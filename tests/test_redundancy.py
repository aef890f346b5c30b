"""The redundancy analysis: times of a bare UNet's units, records, figures, the command."""

import json

import pytest
import torch

import leansd
from leansd.anatomy.builtin import open_builtin
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.evaluation.inner_timing import time_units
from leansd.evaluation.records import load_records, stamp
from leansd.evaluation.redundancy import list_records, read_spent
from leansd.report.nets import draw_blocks, draw_units
from pages import read_page
from tiny import tiny_pipeline, tiny_unet, tiny_xl_unet


@pytest.mark.parametrize("make", [tiny_unet, tiny_xl_unet])
def test_every_unit_and_part_is_timed_in_every_call(make):
    unet = make()
    anatomy = leansd.dissect(unet, latent=8)
    told: list[float] = []
    times = time_units(unet, latent=8, tokens=5, repeats=2, on_call=told.append)
    assert set(times.units) == {unit.at for unit in (*anatomy.units, *anatomy.parts)}
    assert {len(each.seconds) for each in (times.call, *times.units.values())} == {2}
    assert told[1:] == list(times.call.seconds)
    for place, whole in enumerate(times.call.seconds):
        assert sum(times.units[at].seconds[place] for at in anatomy.addresses) <= whole
    assert not any("forward" in vars(module) for module in unet.modules())


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(LeansdError, match="0 repeats: at least 1"):
        time_units(tiny_unet(), repeats=0)
    with pytest.raises(LeansdError, match="0 samples: at least 1"):
        time_units(tiny_unet(), batch=0)
    with pytest.raises(LeansdError, match="calls on meta cannot be timed"):
        time_units(open_builtin("sd15"))


def test_records_say_all_that_the_figures_need():
    unet = tiny_unet()
    anatomy = leansd.dissect(unet, latent=8, name="tiny")
    times = time_units(unet, latent=8, repeats=1)
    (spent,) = read_spent(list_records(anatomy, times, stamp("cpu")))
    assert list(spent.kinds) == list(spent.params) == list(spent.seconds) == [*anatomy.addresses]
    assert spent.params == {unit.at: unit.params for unit in anatomy}
    assert spent.macs == {unit.at: unit.macs for unit in anatomy}
    assert spent.seconds == {at: times.medians[at] for at in anatomy.addresses}
    assert spent.whole["call_time"] == times.call.median
    assert spent.share("macs", "dn0") == anatomy.select("dn0").macs / anatomy.macs


def test_figures_show_blocks_and_units_of_every_model():
    models = [
        read_spent(list_records(leansd.dissect(unet, name=name, latent=64), None, stamp()))[0]
        for name, unet in {"sd15": tiny_unet(), "sd21-base": tiny_unet(layers_per_block=1)}.items()
    ]
    blocks = draw_blocks(models)
    assert [axes.get_title(loc="left") for axes in blocks.axes] == [
        "sd15, 64x64 latents",
        "sd21-base, 64x64 latents",
    ]
    heights = [bar.get_height() for bar in blocks.axes[0].patches]
    assert heights[:9] == [100 * models[0].share("params", at) for at in models[0].blocks]
    units = draw_units(models)
    assert [axes.get_ylabel() for axes in units.axes] == ["GMAC", "parameters, M"] * 2
    assert len(units.axes[0].patches) == 46
    assert len(units.axes[2].patches) == 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_anatomy_writes_records_figures_and_page(model, tmp_path, capsys):
    out = tmp_path / "new"
    arguments = ["anatomy", model, "--time", "--repeats", 1, "--out", out, "--json"]
    assert main([str(each) for each in arguments]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out.splitlines()[-1])
    assert facts["unit_times"]["up3.l2.attn"] > 0
    assert "s a call" not in printed.out
    metrics = {record.metric for record in load_records(out / "records.jsonl")}
    assert metrics == {"params", "macs", "unit_time", "unet_params", "unet_macs", "call_time"}
    for name in ("blocks", "units"):
        assert (out / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"report-{name}.svg").read_text()
    _, page = read_page(out / "report.html")
    assert "Latency and parameters by unit" in page
    assert torch.is_grad_enabled()
