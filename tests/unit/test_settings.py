"""Settings: four sources, one winner each, and no misspelt name survives."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

import dylora_stream
from dylora_stream.bootstrap.parts import check_method, wire_codec
from dylora_stream.core.errors import BadRecord, SettingsError
from dylora_stream.core.events import EventType
from dylora_stream.core.messages import Position, RawRecord
from dylora_stream.settings import Settings, is_secret, load_settings, setting_names


@pytest.fixture(autouse=True)
def _clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DYLORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def origins(settings: Settings) -> dict[str, tuple[str, str]]:
    """Name -> (value, source) of everything that is not a default."""
    return {row.name: (row.value, row.source) for row in settings.explain() if row.source != "default"}


def test_defaults_are_valid_and_all_explained() -> None:
    """Without any source every setting has its default and says so."""
    settings = load_settings()
    assert [row.name for row in settings.explain()] == setting_names()
    assert origins(settings) == {}


def test_later_sources_win_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File under environment under flag; each value remembers who gave it."""
    file = tmp_path / "other.toml"
    file.write_text("[model]\nstem_layers = 3\nmax_input_tokens = 300\nthreads = 1\n")
    monkeypatch.setenv("DYLORA_MODEL__STEM_LAYERS", "4")
    monkeypatch.setenv("DYLORA_MODEL__MAX_INPUT_TOKENS", "400")
    settings = load_settings(file, ["model.stem_layers=5"])
    assert (settings.model.stem_layers, settings.model.max_input_tokens, settings.model.threads) == (
        5,
        400,
        1,
    )
    assert origins(settings) == {
        "model.stem_layers": ("5", "flag"),
        "model.max_input_tokens": ("400", "DYLORA_MODEL__MAX_INPUT_TOKENS"),
        "model.threads": ("1", f"file {file}"),
    }


def test_the_file_is_found_by_name_and_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./dylora.toml is read by itself; DYLORA_CONFIG names another."""
    (tmp_path / "dylora.toml").write_text("[pool]\nslots = 5\n")
    assert load_settings().pool.slots == 5
    (tmp_path / "mine.toml").write_text("[pool]\nslots = 6\n")
    monkeypatch.setenv("DYLORA_CONFIG", "mine.toml")
    assert load_settings().pool.slots == 6


def test_one_value_leaves_the_others_of_its_section_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section whose defaults are not its class's keeps them beside an overridden field."""
    default = load_settings().consolidation
    monkeypatch.setenv("DYLORA_CONSOLIDATION__EPOCHS", "9")
    changed = load_settings().consolidation
    assert (changed.epochs, changed.rate, changed.decay_share) == (9, default.rate, default.decay_share)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("DYLORA_MODEL__STEM_LAYER", "DYLORA_MODEL__STEM_LAYERS"),
        ("DYLORA_MODLE__STEM_LAYERS", "DYLORA_MODEL__STEM_LAYERS"),
        ("DYLORA_MODEL_STEM_LAYERS", "DYLORA_MODEL__STEM_LAYERS"),
        ("DYLORA_CONFG", "DYLORA_CONFIG"),
        ("dylora_pool__slot", "DYLORA_POOL__SLOTS"),
    ],
)
def test_a_misspelt_variable_is_refused_with_what_was_meant(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pydantic-settings would ignore it; here it ends the process."""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SettingsError, match=f"{variable}; did you mean {meant}"):
        load_settings()


def test_the_tests_own_variable_is_not_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """DYLORA_TEST_BOOTSTRAP chooses the tests' broker and is let through."""
    monkeypatch.setenv("DYLORA_TEST_BOOTSTRAP", "127.0.0.1:1")
    assert origins(load_settings()) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\nstem_layer = 3\n", "model.stem_layer; did you mean model.stem_layers"),
        ("[modle]\nstem_layers = 3\n", "modle.stem_layers; did you mean model.stem_layers"),
        ("stem_layers = 3\n", r"below a line such as \[model\]"),
        ("[model\n", "not readable as TOML"),
    ],
)
def test_a_wrong_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    """Unknown names, values outside of a section, and what is no TOML at all."""
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=said):
        load_settings(file)


def test_as_many_choices_are_taken_as_the_setting_says() -> None:
    """Fewer than by default, or more."""
    for most in (2, 200):
        codec = wire_codec(load_settings(flags=[f"generation.max_choices={most}"]), "serve-0")

        def asking(count: int) -> RawRecord:
            value = json.dumps({"input": "which?", "choices": [str(number) for number in range(count)]})
            return RawRecord(position=Position("requests", 0, 0), value=value.encode())

        assert len(codec.decode_request(asking(most)).choices) == most
        with pytest.raises(BadRecord, match=rf"generation\.max_choices is {most}"):
            codec.decode_request(asking(most + 1))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A named file must exist; only ./dylora.toml may be absent."""
    with pytest.raises(SettingsError, match="not a file"):
        load_settings(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("model.stem_layers=0", r"model\.stem_layers is 0: it must be at least 1 \(from flag\)"),
        ("model.stem_layers=x", r"model\.stem_layers is 'x': .*integer"),
        ("router.top_k=1", r"router\.top_k must be at least 2"),
        ("log.level=loud", "'debug', 'info', 'warning' or 'error'"),
        ("http.port=99999", "http.port is 99999: use 1 to 65534"),
        ("http.host=[::1]", "http.host is .*: write an IPv6 address without brackets"),
        ("http.port=65535", "http.port is 65535: use 1 to 65534, because learn takes the next one"),
        ("model.stem_layer=3", "did you mean model.stem_layers"),
        ("model.stem_layers", "write it as section.field=value"),
        ("kafka.bootstrap_servers=nowhere:x", "is not host:port"),
        ("kafka.names=x", "write it as JSON"),
        ("seeding.rank=16", r"seeding\.rank is 16: .*pool\.rank \(8\).*raise pool\.rank.* \(from flag\)"),
        ("pool.rank=4", r"seeding\.rank is 8: .*pool\.rank \(4\)"),
        ("consolidation.rank=8", "there is no setting consolidation.rank"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_would_be_right(flag: str, said: str) -> None:
    """Checks of a dataclass and of its types arrive as the same kind of sentence."""
    with pytest.raises(SettingsError, match=said):
        load_settings(flags=[flag])


def test_a_larger_pool_lets_experts_be_larger() -> None:
    """Both ranks together are accepted, and a smaller expert fits any pool."""
    settings = load_settings(flags=["seeding.rank=16", "pool.rank=16"])
    assert (settings.seeding.rank, settings.pool.rank) == (16, 16)
    assert load_settings(flags=["seeding.rank=4"]).seeding.rank == 4


def test_the_daemon_refuses_a_method_that_it_cannot_serve() -> None:
    """It says where that one can be measured, and which ones it serves."""
    check_method(load_settings(flags=["router.method=ridge"]))
    with pytest.raises(SettingsError, match="'xlora'.*bench continual.*hybrid.*ridge"):
        check_method(load_settings(flags=["router.method=xlora"]))


def test_tables_are_json_in_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping can be given where only text can."""
    monkeypatch.setenv("DYLORA_KAFKA__NAMES", '{"requests": "orders"}')
    assert load_settings().kafka.names == {"requests": "orders"}


def test_secrets_are_hidden_and_stay_off_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password is in no listing, and --set refuses it, because command lines are public."""
    monkeypatch.setenv("DYLORA_KAFKA__SASL_PASSWORD", "hunter2")
    settings = load_settings()
    assert settings.kafka.sasl_password == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in "".join(row.value for row in settings.explain())
    assert is_secret("kafka.sasl_password")
    with pytest.raises(SettingsError, match="DYLORA_KAFKA__SASL_PASSWORD"):
        load_settings(flags=["kafka.sasl_password=hunter2"])


def test_a_password_in_the_expert_store_s_url_is_refused_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is the environment of the storage's own library, which no command shows."""
    monkeypatch.setenv("DYLORA_STORE__EXPERTS", "sftp://me:hunter2@nas/experts")
    with pytest.raises(SettingsError, match="FSSPEC_SFTP_PASSWORD") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("DYLORA_STORE__EXPERTS", "sftp://me@nas/experts")
    assert load_settings().store.experts == "sftp://me@nas/experts"


def test_another_process_gets_the_same_settings(tmp_path: Path) -> None:
    """`arguments` are the flags that reproduce what the environment does not carry."""
    file = tmp_path / "some.toml"
    file.write_text("[pool]\nslots = 7\n")
    settings = load_settings(file, ["http.port=0", "log.level=debug"])
    assert settings.arguments == ("--config", str(file), "--set", "http.port=0", "--set", "log.level=debug")
    again = load_settings(Path(settings.arguments[1]), settings.arguments[3::2])
    assert again.model_dump() == settings.model_dump()


def test_an_unknown_section_without_a_setting_is_refused(tmp_path: Path) -> None:
    """One whose lines are all comments too: the next line written there would be lost."""
    file = tmp_path / "my.toml"
    file.write_text("[kafak]\n# prefix = 'x.'\n")
    with pytest.raises(SettingsError, match=r"my.toml: there is no section \[kafak\]; did you mean kafka\?"):
        load_settings(file)
    file.write_text("[kafka]\n# prefix = 'x.'\n")
    assert load_settings(file).kafka.prefix == "dylora."


def test_each_setting_that_a_message_names_exists() -> None:
    """What the program tells people to set is there to be set."""
    sections = "|".join(Settings.model_fields)
    others = {"consolidation.rank", "router.rate", "router.decay", *EventType}  # no setting, tensors, events
    endings = {"duckdb", "safetensors", "dirs"}  # files, and a property of Apache Kafka
    for file in Path(dylora_stream.__file__).parent.rglob("*.py"):
        module = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(first_text(node)) for node in ast.walk(module)}
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                named = re.findall(rf"(?<![\w./])(?:{sections})\.[a-z_]+\b(?![.(/])", node.value)
                wrong = {name for name in named if name.partition(".")[2] not in endings}
                assert wrong - others <= set(setting_names()), f"{file}:{node.lineno}"


def first_text(node: ast.AST) -> ast.expr | None:
    """A module's, class's or function's docstring."""
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    return first.value if isinstance(first, ast.Expr) else None


@pytest.mark.parametrize(
    "flag",
    [
        "serve.poll_timeout_s=-1",
        "serve.registry_timeout_s=0",
        "learn.poll_timeout_s=1e9",
        "kafka.session_timeout_s=-1",
        "kafka.request_timeout_s=nan",
        "novelty.beyond_margin=inf",
        "kafka.max_message_bytes=-1",
        "topics.replication=0",
        "store.threads=99999999999999",
        "kafka.prefix=a b",
        'kafka.names={"requests": "a", "results": "a"}',
        'kafka.names={"requests": ""}',
    ],
)
def test_a_number_or_name_that_cannot_work_is_refused_by_its_setting(flag: str) -> None:
    """Before a process starts with it, and in our own words."""
    with pytest.raises(SettingsError, match=flag.partition("=")[0].partition(".")[0]):
        load_settings(flags=[flag])


def test_a_file_with_a_byte_order_mark_is_said_so(tmp_path: Path) -> None:
    """As Windows editors write it, and TOML does not take it."""
    file = tmp_path / "some.toml"
    file.write_bytes(b"\xef\xbb\xbf[pool]\nslots = 7\n")
    with pytest.raises(SettingsError, match="without one"):
        load_settings(file)
