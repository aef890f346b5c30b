"""The whole manual: what all commands share, then every command."""

from collections.abc import Iterable, Iterator

from leansd.cli.manpages.pages import Page, Parameter
from leansd.cli.manpages.sections import Section

OUTPUT = (
    "Results go to standard output; progress and notes go to standard error, and progress only to "
    "a terminal. --quiet leaves both out: results, warnings and errors remain.",
    "--json ends standard output with one line that holds one JSON object. demo and profile always "
    "end so, and --json leaves out what comes before it.",
)
EXIT_CODES = (
    ("0", "Done."),
    (
        "1",
        "Something went wrong on the way: no memory or disk left, a file not to be written.",
    ),
    (
        "2",
        "The command or what it was given is wrong: an option, a number, a name or a file. One "
        "line on standard error says what, and what would be right; nothing was written.",
    ),
    ("130", "Stopped by Ctrl-C. What can be resumed says so in its own help."),
)
ENVIRONMENT = (
    ("NO_COLOR", "Set to anything: no colours."),
    ("COLUMNS", "Width of help and tables; the terminal's own by default."),
    ("HF_HUB_OFFLINE", "Set to 1: models by hub id are taken from the local cache only."),
    ("HF_HOME", "Where models by hub id are kept; ~/.cache/huggingface by default."),
)
COMPLETION = (
    "leansd --install-completion teaches the shell that runs it (bash, zsh, fish, PowerShell) the "
    "commands, their options, and the names of presets, samplers, surgeries and models.",
)


def compose(pages: Iterable[Page]) -> Iterator[Section]:
    """The sections of the manual; the first page is the program itself."""
    whole, *commands = pages
    yield Section("Name", 1, paragraphs=(f"{whole.name} - {whole.paragraphs[0]}",))
    yield Section("Synopsis", 1, code=(whole.usage,))
    yield Section("Options", 1, terms=_list_terms(whole.options))
    yield Section("Examples", 1, code=whole.examples)
    yield Section("Output", 1, paragraphs=OUTPUT)
    yield Section("Exit codes", 1, terms=EXIT_CODES)
    yield Section("Environment", 1, terms=ENVIRONMENT)
    yield Section("Completion", 1, paragraphs=COMPLETION)
    yield Section("Commands", 1)
    for page in commands:
        yield from compose_page(page)


def compose_page(page: Page) -> Iterator[Section]:
    """The sections of one command."""
    yield Section(page.name, 2, code=(page.usage,), paragraphs=page.paragraphs)
    if page.arguments:
        yield Section("Arguments", 3, terms=_list_terms(page.arguments))
    if page.options:
        yield Section("Options", 3, terms=_list_terms(page.options))
    yield Section("Examples", 3, code=page.examples)


def _list_terms(parameters: Iterable[Parameter]) -> tuple[tuple[str, str], ...]:
    return tuple((each.typed, each.text) for each in parameters)
