"""The command line: what each command gives, and one line for every mistake."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from errno import ENOSPC
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

import leansd
from leansd import drawing, loading
from leansd.cli import COMMANDS, main
from leansd.cli.options import keep_default
from pages import read_page
from tiny import shallow_unet, tiny_pipeline

STEPS = "4"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "shallow"
    tiny_pipeline(unet=shallow_unet()).save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Run the command line; gives exit code, standard output and standard error."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def fails(run, tmp_path):
    """Run a command that must fail with one line and leave nothing behind; gives the line."""

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("leansd: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return call


# -- the whole ---------------------------------------------------------------------------------


def test_help_is_quick_and_names_every_command():
    code = (
        "import sys; from leansd.cli import main; main(['--help']); "
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


def test_a_mistake_in_a_real_process_is_exit_code_2_and_one_line(tmp_path):
    # `.ci/smoke` makes a mistake that is found behind the imports, which take seconds.
    command = [sys.executable, "-m", "leansd.cli", "generate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_version_and_bare_call(run):
    assert run("--version") == (0, f"leansd {leansd.__version__}\n", "")
    code, out, _ = run()
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["genrate"], "Did you mean 'generate'"),
        (["genrate"], "(see leansd --help)"),
        (["generate"], "give prompts, or a file of them"),
        (["generate", "a", "--steps", "many"], "--steps"),
        (["generate", "a", "--steps", "0"], "--steps"),
        (["generate", "a", "--colour"], "--colour"),
        (["--colour"], "--colour"),
        (["generate", "a", "--plan"], "(see leansd generate --help)"),
    ],
)
def test_usage_errors_are_one_line(fails, arguments, said):
    assert said in fails(*arguments)


def test_ctrl_c_is_exit_code_130_and_one_line(run, shallow, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("leansd.drawing.paint", interrupt)
    code, out, err = run("generate", "a", "--model", shallow, "--out", tmp_path / "out")
    assert (code, out, err) == (130, "", "leansd: stopped\n")
    assert not (tmp_path / "out").exists()


# -- generate ----------------------------------------------------------------------------------


def test_generate_draws_pictures_that_carry_their_facts(run, shallow, tmp_path):
    out = tmp_path / "deep" / "out"
    code, printed, told = run(
        "generate", "a red apple", "pizza", "--model", shallow, "--steps", STEPS, "--seed", 3,
        "--count", 2, "--guidance", 2, "--negative", "blue", "--sampler", "euler", "--plan", "fast",
        "--force", "--out", out, "--json",
    )  # fmt: skip
    assert code == 0
    assert f"{out / 'pizza.fast.seed4.png'}  " in told
    assert sorted(path.name for path in out.iterdir()) == [
        "a-red-apple.fast.seed3.png",
        "a-red-apple.fast.seed4.png",
        "pizza.fast.seed3.png",
        "pizza.fast.seed4.png",
    ]
    with Image.open(out / "a-red-apple.fast.seed4.png") as image:
        facts = image.text
        assert image.size == (32, 32)
    assert facts == {
        "prompt": "a red apple",
        "negative": "blue",
        "seed": "4",
        "steps": "4",
        "sampler": "euler",
        "guidance": "2.0",
        "model": shallow,
        "plan": "fast",
        "plan_fingerprint": leansd.preset("fast", 4, sampler="euler").fingerprint,
        "leansd": leansd.__version__,
    }
    report, wrote, last = printed.strip().splitlines()[-3:]
    assert wrote == f"wrote 4 pictures in {out}"
    assert "UNet calls" in report
    pictures = json.loads(last)["pictures"]
    assert len(pictures) == 4
    assert pictures[0]["calls"] == 4
    assert pictures[0]["seconds"] > 0


def test_generate_is_the_pipeline_itself_under_the_full_plan(run, shallow, tmp_path):
    run(
        "generate",
        "apple",
        "--model",
        shallow,
        "--steps",
        STEPS,
        "--plan",
        "full",
        "--out",
        tmp_path,
    )
    pipe = leansd.load(shallow, device="cpu")
    expected = pipe("apple", num_inference_steps=4, generator=torch.manual_seed(0)).images[0]
    with Image.open(tmp_path / "apple.full.seed0.png") as image:
        assert image.tobytes() == expected.tobytes()


def test_generate_from_a_picture(run, shallow, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    code, out, _ = run(
        "generate", "apple", "--model", shallow, "--steps", 10, "--init", tmp_path / "red.png",
        "--strength", 0.5, "--size", "24x16", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    with Image.open(tmp_path / "out" / "apple.balanced.seed0.png") as image:
        assert image.size == (24, 16)
        assert image.text["strength"] == "0.5"
    assert json.loads(out.splitlines()[-1])["pictures"][0]["calls"] == 5


def test_generate_compares_with_the_full_run(run, shallow, tmp_path, fails):
    shared = ["generate", "a", "pizza", "--model", shallow, "--steps", 9, "--plan", "turbo"]
    code, out, _ = run(*shared, "--compare", "--out", tmp_path)
    assert code == 0
    assert f"wrote 2 pictures in {tmp_path}, {tmp_path / 'report.html'}" in out
    page, text = read_page(tmp_path / "report.html")
    assert len(page.images) == 2 * 3  # in full, after the plan, the difference
    assert "2 pictures were drawn" in text
    # Comparing changes no picture and no number of a run.
    own = tmp_path / "own"
    assert run(*shared, "--out", own)[0] == 0
    for path in own.glob("*.png"):
        with Image.open(path) as alone, Image.open(tmp_path / path.name) as compared:
            assert alone.tobytes() == compared.tobytes()
            assert alone.text == compared.text
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "prompt": "a"}')
    told = fails("generate", "--prompts", rows, "--compare", "--model", shallow)
    assert "leave --prompts out" in told


def test_generate_runs_few_steps_in_full(run, shallow, tmp_path):
    shared = ["generate", "a", "--model", shallow, "--plan", "fast", "--out", tmp_path, "--json"]
    _, out, told = run(*shared, "--steps", 8)
    assert "8 steps change too much" in told
    assert json.loads(out.splitlines()[-1])["pictures"][0]["plan"] == "full"
    _, out, told = run(*shared, "--steps", 9)
    assert "in full" not in told
    assert json.loads(out.splitlines()[-1])["pictures"][0]["plan"] == "fast"


def test_generate_takes_its_steps_from_a_plan_file(run, shallow, tmp_path):
    leansd.preset("turbo", 5).save(tmp_path / "plan.json")
    shared = ["generate", "a", "--model", shallow, "--plan", tmp_path / "plan.json", "--json"]
    _, out, _ = run(*shared, "--out", tmp_path / "own")
    assert json.loads(out.splitlines()[-1])["pictures"][0]["steps"] == 5
    _, out, _ = run(*shared, "--out", tmp_path / "fit", "--steps", 3, "--fit")
    assert json.loads(out.splitlines()[-1])["pictures"][0]["steps"] == 3


def test_generate_tells_what_is_wrong_before_a_weight_is_read(fails, model, tmp_path, monkeypatch):
    open_model = loading.load

    def load(name, **options):
        assert str(name) != str(model), "its weights are read"
        return open_model(name, **options)

    monkeypatch.setattr(loading, "load", load)
    (tmp_path / "file").write_text("no picture, no plan")
    leansd.preset("turbo", 5).save(tmp_path / "plan.json")
    leansd.Plan.full(4).inherit("up2.attn", at=1).save(tmp_path / "other.json")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    noise = Image.effect_noise((64, 64), 50)
    noise.save(tmp_path / "broken.png")
    broken = (tmp_path / "broken.png").read_bytes()[:1000]
    (tmp_path / "broken.png").write_bytes(broken)
    for options, said in (
        (["--plan", "fsat"], "did you mean fast?"),
        (["--plan", tmp_path / "file"], "is not a valid plan file"),
        (["--plan", tmp_path / "none.json"], "no plan file at"),
        (
            ["--plan", tmp_path / "plan.json", "--steps", 6],
            "5 steps, this run has 6",
        ),
        (["--plan", tmp_path / "other.json"], "step 1"),
        (["--model", "none"], "no model 'none': give 'emoji'"),
        (["--model", "nobody/none"], "HF_HUB_OFFLINE"),
        (["--model", tmp_path], "has no model_index.json"),
        (["--init", tmp_path / "none.png"], "no picture at"),
        (["--init", tmp_path / "file"], "is not a readable picture"),
        (["--init", tmp_path / "broken.png"], "is not a readable picture"),
        (["--strength", 2], "strength 2 lies outside (0, 1]"),
        (["--strength", 0], "strength 0 lies outside (0, 1]"),
        (["--init", tmp_path / "good.png", "--strength", 0.1, "--steps", 4], "leaves no step"),
        (
            ["--init", tmp_path / "good.png", "--strength", 0.1, "--plan", tmp_path / "plan.json"],
            "leaves no step",
        ),
        (["--sampler", "eulr"], "did you mean euler?"),
        (["--size", "big"], "give 512 or"),
        (["--size", "100x50"], "multiples of 8"),
        (["--device", "gpu"], "no device 'gpu': this machine has"),
        (["--dtype", "half"], "no dtype 'half': give float32, float16, bfloat16"),
        (["--out", tmp_path / "file" / "out"], "is not a folder"),
    ):
        shared = {"--model": model, "--out": tmp_path / "out"}
        given = dict(zip(options[::2], options[1::2], strict=True))
        arguments = [text for pair in (shared | given).items() for text in pair]
        assert said in fails("generate", "a", *arguments), options


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_every_face_runs_the_plan_of_the_sampler(run, shallow, tmp_path, sampler):
    """Not the hand-made schedule, which is what a preset is without one."""
    expected = leansd.preset("balanced", 9, sampler=sampler).fingerprint
    shared = ["--steps", 9, "--sampler", sampler, "--model", shallow, "--json"]
    _, out, _ = run("generate", "a", *shared, "--out", tmp_path)
    assert json.loads(out.splitlines()[-1])["pictures"][0]["plan_fingerprint"] == expected
    _, out, _ = run("plan", "balanced", *shared)
    assert json.loads(out.splitlines()[-1])["fingerprint"] == expected
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "prompt": "a"}')
    run("generate", "--prompts", rows, *shared, "--out", tmp_path / "rows")
    job = json.loads((tmp_path / "rows" / "job.json").read_text())
    assert leansd.Plan.from_dict(job["plan"]).fingerprint == expected


def test_no_picture_is_written_over(run, shallow, tmp_path):
    long = "a castle on a hill above a lake at dawn in a very detailed style "
    prompts = [f"{long} one", f"{long} two", "猫", "犬", "猫", "../a/b", "A B", "a b"]
    shared = ["--model", shallow, "--steps", 1, "--out", tmp_path, "--json"]
    _, out, _ = run("generate", *prompts, *shared)
    pictures = json.loads(out.splitlines()[-1])["pictures"]
    paths = [Path(each["path"]) for each in pictures]
    assert {path.parent for path in paths} == {tmp_path}
    assert (
        len({str(path).casefold() for path in paths}) == len(prompts) == len(list_files(tmp_path))
    )
    for path, prompt in zip(paths, prompts, strict=True):
        with Image.open(path) as image:
            assert image.text["prompt"] == prompt
    before = read_files(tmp_path)
    _, out, _ = run("generate", "猫", *shared)  # the same again
    assert read_files(tmp_path) == before
    _, out, _ = run("generate", "猫", *shared, "--guidance", 2)
    assert read_files(tmp_path).items() > before.items()
    (path,) = (each["path"] for each in json.loads(out.splitlines()[-1])["pictures"])
    assert path == str(tmp_path / "猫.full.seed0-3.png")
    run("generate", "猫", *shared, "--guidance", 2, "--overwrite")
    assert len(read_files(tmp_path)) == len(before) + 1


@pytest.mark.parametrize(
    "command",
    [
        ("profile", "--repeats", 1, "--steps", 2),
        ("evaluate", "--plan", "full", "--count", 2, "--steps", 2, "--reference", "full"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_is_a_sentence_and_the_command_goes_on(
    run, shallow, tmp_path, monkeypatch, command, room
):
    """Files, but for so many, find no room: what was there stays, and nothing is half written."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a\nb\n")
    name, *options = command
    given = [name, shallow, *options, "--out", out]
    given += ["--prompts", prompts] if name == "evaluate" else []
    write, left = Path.write_bytes, [room]

    def fill(self, content):
        if not left[0]:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        left[0] -= 1
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        code, _, err = run(*given)
    assert code != 0
    assert err.splitlines()[-1].startswith("leansd: ")
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert len([each for each in out.rglob("*") if each.is_file()]) == room
    assert run(*given)[0] == 0


def test_what_an_earlier_run_has_measured_stays(run, shallow, tmp_path, monkeypatch):
    """Two runs into one folder, as with the defaults; only who is told to writes over."""
    command = ["anatomy", shallow, "--out", tmp_path, "--json"]
    _, out, _ = run(*command)
    before = read_files(tmp_path)
    assert sorted(json.loads(out.splitlines()[-1])["files"])[-1] == str(tmp_path / "report.html")
    _, out, _ = run(*command, "--tokens", 5)
    files = json.loads(out.splitlines()[-1])["files"]
    assert sorted(files) == [str(tmp_path / name) for name in ("records-2.jsonl", "report-2.html")]
    assert read_files(tmp_path).items() > before.items()
    run(*command, "--overwrite")
    assert len(read_files(tmp_path)) == 2 * len(before)
    for name in ("demo", "evaluate", "profile", "bench", "generate"):
        assert "--overwrite" in run(name, "--help")[1]
    monkeypatch.chdir(tmp_path)
    plan = Path("plan.json")
    assert keep_default(plan, plan) == plan
    plan.write_text("{}")
    assert keep_default(plan, plan) == Path("plan-2.json")
    assert keep_default(tmp_path / plan, plan) == tmp_path / plan


def list_files(folder):
    return [path for path in folder.iterdir() if path.is_file()]


def read_files(folder):
    return {path.name: path.read_bytes() for path in list_files(folder)}


def break_weights(pipe):
    pipe.unet.conv_out.bias.data[0] = float("nan")


def flag_all(pipe):
    honest = type(pipe).run_safety_checker
    pipe.run_safety_checker = lambda image, *rest: (honest(pipe, image, *rest)[0], [True])


def blacken(pipe):
    pipe.vae.decode = lambda latents, **_: (torch.full((1, 3, 32, 32), float("nan")),)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (break_weights, "from step 1 of 9 on; so does the full run"),
        (flag_all, "safety checker"),
        (blacken, "all its pixels are equal"),
    ],
)
def test_a_picture_that_shows_nothing_is_not_written(
    run, shallow, tmp_path, monkeypatch, harm, told
):
    honest = loading.load

    def load(*arguments, **options):
        pipe = honest(*arguments, **options)
        harm(pipe)
        return pipe

    monkeypatch.setattr(loading, "load", load)
    out = tmp_path / "out"
    shared = ["--model", shallow, "--steps", 9, "--plan", "fast", "--out", out, "--json"]
    code, printed, said = run("generate", "a", *shared)
    assert code == 1
    assert told in said
    assert not out.exists()
    assert json.loads(printed.splitlines()[-1])["pictures"] == []


def test_the_plan_is_blamed_where_the_full_run_is_sound(run, shallow, tmp_path, monkeypatch):
    honest = drawing.inherit

    @contextmanager
    def inherit(pipe, plan, **options):
        bias = pipe.unet.conv_out.bias.data
        kept = bias.clone()
        with honest(pipe, plan, **options) as run:
            bias[0] = float("inf")
            yield run
            bias.copy_(kept)

    monkeypatch.setattr(drawing, "inherit", inherit)
    shared = ["--model", shallow, "--plan", "fast", "--steps", 9, "--out", tmp_path / "out"]
    code, _, said = run("generate", "a", *shared)
    assert code == 1
    assert "from step 1 of 9 on; the full run is sound: use --plan full" in said


COMMANDS_TO_RUN = {
    "generate": ["a", "--steps", 2, "--model", "MODEL"],
    "generate rows": ["--prompts", "ROWS", "--steps", 2, "--model", "MODEL"],
    "demo": ["--steps", 3, "--prompts", "a", "--model", "MODEL"],
    "anatomy": ["MODEL", "--time", "--repeats", 1],
    "profile": ["MODEL", "--repeats", 1, "--check", 0, "--steps", 2],
    "evaluate": [
        "MODEL", "--plan", "full", "--steps", 2, "--count", 2, "--prompts", "PROMPTS",
        "--reference", "full", "--seeds-for-spread", 0,
    ],
    "cut": [
        "MODEL", "--of", "macs", "--budget", 0.9, "--count", 1, "--steps", 2, "--moments", 1,
        "--tries", 0, "--prompts", "PROMPTS",
    ],
    "tune": [
        "MODEL", "--prompts", "PROMPTS", "--count", 4, "--steps", 4, "--speeds", "1.5",
        "--psnr", 1, "--tries", 0, "--sampler", "ddim",
    ],
    "bench": [
        "--model", "MODEL", "--quick", "--rivals", "fewer", "--sampler", "ddim", "--steps", 4,
        "--converged-steps", 6, "--count", 2, "--prompts", "PROMPTS", "--seeds-for-spread", 0,
        "--out", "bench.jsonl",
    ],
}  # fmt: skip


IN_BOTH = COMMANDS_TO_RUN.keys() - {"tune", "bench"}
"""`test_half_precision` searches and measures in both, which takes long."""


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A CPU convolves in half precision seven times as slowly."""
    path = tmp_path_factory.mktemp("models") / "narrow"
    tiny_pipeline(unet=shallow_unet(block_out_channels=(16,))).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*product(COMMANDS_TO_RUN, ["float16"]), *product(sorted(IN_BOTH), ["bfloat16"])],
)
def test_every_command_runs_in_half_precision(run, narrow, tmp_path, monkeypatch, name, dtype):
    """As everybody with a GPU runs it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a boat\na tree\n")
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "a"}')
    given = {"MODEL": narrow, "PROMPTS": "prompts.txt", "ROWS": "rows.jsonl"}
    arguments = [given.get(each, each) for each in COMMANDS_TO_RUN[name]]
    code, out, said = run(name.split()[0], *arguments, "--dtype", dtype, "--json")
    assert code == 0, said
    assert json.loads(out.splitlines()[-1])["command"] == name.split()[0]
    assert f"{dtype} on a CPU saves memory" in said


# -- anatomy and plan --------------------------------------------------------------------------


def test_anatomy_is_a_tree_and_json(run, model):
    code, out, _ = run("anatomy", model, "--latent", 16, "--tokens", 24, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0
    assert "up3.l2.attn" in out
    assert (facts["units"], facts["ends"], facts["tokens"]) == (44, 2, 24)
    assert facts["latent"] == [16, 16]
    assert len(facts["rows"]) == 46
    assert sum(row["macs"] for row in facts["rows"]) <= facts["macs"]


def test_anatomy_of_a_built_in_shape_needs_no_weights(run, fails):
    code, out, _ = run("anatomy", "sd15", "--latent", 64)
    assert code == 0
    assert "859.52 M" in out
    assert "no model 'sd16': give sd15, sd21-base, sdxl" in fails("anatomy", "sd16")


def test_plan_lists_draws_and_saves(run, model, tmp_path):
    code, out, _ = run("plan", "--json")
    assert code == 0
    assert set(json.loads(out.splitlines()[-1])["presets"]) >= {"quality", "balanced", "deepcache"}
    file, picture = tmp_path / "new" / "plan.json", tmp_path / "plan.svg"
    code, out, _ = run(
        "plan",
        "balanced",
        "--steps",
        10,
        "--model",
        model,
        "-o",
        file,
        "--picture",
        picture,
        "--report",
        tmp_path / "plan.html",
        "--json",
    )
    assert code == 0
    assert "up3.l2.res" in out
    facts = json.loads(out.splitlines()[-1])
    assert facts["predicted_speedup"] > 1.2
    assert leansd.Plan.load(file).fingerprint == facts["fingerprint"]
    assert picture.read_text().startswith("<?xml")
    _, page = read_page(tmp_path / "plan.html")
    assert f"<code>leansd plan balanced --steps 10 --model {model} -o {file}" in page
    code, out, _ = run("plan", file, "--model", model, "--steps", 20, "--fit")
    assert code == 0
    assert "20 steps" in out


def test_plan_tells_what_is_wrong(fails, model, tmp_path):
    (tmp_path / "file").write_text("{}")
    assert "did you mean fast?" in fails("plan", "fsat", "--model", model)
    assert "not a valid plan" in fails("plan", tmp_path / "file", "--model", model)
    assert "must end in" in fails("plan", "fast", "--model", model, "--picture", tmp_path / "a.doc")
    assert "is not a folder" in fails(
        "plan", "fast", "--model", model, "-o", tmp_path / "file" / "a.json"
    )


# -- operate -----------------------------------------------------------------------------------


def test_operate_writes_a_unet_that_opens(run, model, tmp_path):
    (tmp_path / "light.yaml").write_text("edits: [{drop: [dn0.l1, up3.l1, up2.l0.attn]}]")
    out = tmp_path / "new" / "light"
    code, printed, _ = run(
        "operate", tmp_path / "light.yaml", "--model", model, "--out", out, "--json"
    )
    assert code == 0
    facts = json.loads(printed.splitlines()[-1])
    assert (facts["units"], facts["class"]) == (39, "LightUNet2DConditionModel")
    assert facts["dropped"] == ["dn0.l1", "up2.l0.attn", "up3.l1"]
    unet = leansd.load_unet(out, device="cpu")
    assert sum(each.numel() for each in unet.parameters()) == facts["params"][1]
    assert leansd.Surgery.load(out / "surgery.yaml").fingerprint == facts["fingerprint"]
    assert len(leansd.Lineage.load(out).frozen("original")) == 41
    (tmp_path / "taken.yaml").write_text("edits: [{take: dn0, source: light}]")
    whole = tmp_path / "whole"
    code, *_ = run(
        "operate", tmp_path / "taken.yaml", "--model", model, "--net", f"light={out}",
        "--out", whole, "--whole",
    )  # fmt: skip
    assert code == 2  # dn0 has a layer less, up3 does not
    code, *_ = run("operate", "bk-small", "--model", model, "--out", whole, "--whole")
    assert code == 0
    assert leansd.load(whole, device="cpu").unet.mid_block is None


def test_operate_lists_and_previews(run, model, tmp_path):
    code, out, _ = run("operate", "--json")
    assert code == 0
    assert set(json.loads(out.splitlines()[-1])["presets"]) >= {"bk-tiny", "asdm-1222"}
    page = tmp_path / "page.html"
    code, out, _ = run(
        "operate", "bk-tiny", "--model", model, "--preview", "--latent", 8, "--report", page
    )
    assert code == 0
    assert "The new network keeps" in read_page(page)[1]
    assert "44 units become 22" in out
    assert [line for line in out.splitlines() if "wrote" in line] == [f"wrote {page}"]


def test_operate_tells_what_is_wrong(fails, model, tmp_path):
    (tmp_path / "bad.yaml").write_text("edits: [{drop: mid, why: not}]")
    (tmp_path / "half.yaml").write_text("edits: [{drop: dn0.l1}]")
    shared = ("--model", model, "--out", tmp_path / "out")
    assert "give --out" in fails("operate", "bk-tiny", "--model", model)
    assert "did you mean bk-tiny" in fails("operate", "bk-tini", *shared)
    assert "edits.0.drop.why" in fails("operate", tmp_path / "bad.yaml", *shared)
    assert "unbalanced skips" in fails("operate", tmp_path / "half.yaml", *shared)
    assert "give NAME=MODEL" in fails("operate", "bk-tiny", *shared, "--net", "light")
    assert "is not a folder" in fails(
        "operate", "bk-tiny", "--model", model, "--out", tmp_path / "bad.yaml" / "out"
    )
    # A folder with anything in it is somebody's.
    assert str(tmp_path) in fails("operate", "bk-tiny", "--model", model, "--out", tmp_path)
