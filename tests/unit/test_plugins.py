import inspect
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from gelora_plugins import builtin, hookspecs, plugins
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError, PluginError
from gelora_plugins.hookspecs import hookimpl

KINDS = ("estimator", "pooling", "policy")
HOOKS = [name for name, value in vars(hookspecs).items() if inspect.isfunction(value) and hasattr(value, "gelora_spec")]


@pytest.fixture
def install(monkeypatch):
    """A function that makes these the only installed plugins, until the test ends."""

    def install(**loaded):
        entries = [
            plugin
            if isinstance(plugin, EntryPoint)
            else SimpleNamespace(name=name, value=f"{name}:plugin", load=lambda plugin=plugin: plugin)
            for name, plugin in loaded.items()
        ]
        monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "gelora" else [])
        plugins.plugin_manager.cache_clear()

    yield install
    monkeypatch.undo()
    plugins.plugin_manager.cache_clear()


class Poolings:
    def __init__(self, *names):
        self.names = names

    @hookimpl
    def register_poolings(self):
        return dict.fromkeys(self.names, str)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_options_name_something_that_exists(kind):
    assert callable(plugins.find(kind, getattr(GeLoRAConfig(), kind)))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("estimator", "gride, mle, twonn, twonn_mle"),
        ("pooling", "first, last, mean"),
        ("policy", "budget, gelora, uniform"),
    ],
)
def test_an_unknown_name_lists_what_exists(install, kind, names):
    install()
    with pytest.raises(ConfigError, match=f"^{kind} 'men' does not exist; there are: {names}.$"):
        plugins.find(kind, "men")


def test_an_unknown_name_lists_what_plugins_bring(install):
    install(mine=Poolings("median"))
    assert plugins.find("pooling", "median") is str
    with pytest.raises(ConfigError, match="there are: first, last, mean, median"):
        plugins.find("pooling", "men")


def test_an_installed_distribution_is_found(tmp_path, monkeypatch):
    (tmp_path / "a_gelora_plugin.py").write_text(
        "from gelora_plugins import hookimpl\n@hookimpl\ndef register_poolings():\n    return {'of a plugin': len}\n"
    )
    metadata = tmp_path / "a_gelora_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: a-gelora-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[gelora]\nanother = a_gelora_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.plugin_manager.cache_clear()
    try:
        assert plugins.find("pooling", "of a plugin") is len
    finally:
        plugins.plugin_manager.cache_clear()


def test_the_manager_is_built_once(install):
    install()
    assert plugins.plugin_manager() is plugins.plugin_manager()


def test_a_name_of_the_built_ins_in_a_plugin_is_an_error_that_names_both(install):
    install(mine=Poolings("mean"))
    with pytest.raises(PluginError, match="plugins 'gelora' and 'mine' both register the pooling 'mean'"):
        plugins.find("pooling", "mean")


def test_a_name_in_two_plugins_is_an_error_that_names_both(install):
    install(mine=Poolings("median"), yours=Poolings("mode", "median"))
    with pytest.raises(PluginError, match="plugins 'mine' and 'yours' both register the pooling 'median'"):
        plugins.find("pooling", "mean")
    assert callable(plugins.find("policy", "gelora"))


def test_a_misspelt_hook_is_an_error_that_names_the_plugin(install):
    class Misspelt:
        @hookimpl
        def register_pooling(self):
            return {}

    install(fine=Poolings("median"), mine=Misspelt())
    with pytest.raises(
        PluginError, match=r"^The gelora plugin 'mine' \(mine:plugin\) does not load: .*register_pooling"
    ):
        plugins.plugin_manager()


def test_a_hook_with_another_argument_is_an_error_that_names_the_plugin(install):
    class Misspelt:
        @hookimpl
        def find_model_layout(self, modle):
            return None

    install(mine=Misspelt())
    with pytest.raises(PluginError, match=r"(?s)^The gelora plugin 'mine' .*modle"):
        plugins.plugin_manager()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:plugin", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("gelora_plugins.errors:no_such_name", "AttributeError: .*no_such_name"),
    ],
)
def test_a_plugin_that_does_not_import_is_an_error_that_names_it(install, value, reason):
    install(mine=EntryPoint("mine", value, "gelora"))
    with pytest.raises(PluginError, match=rf"^The gelora plugin 'mine' \({value}\) does not load: {reason}"):
        plugins.find("pooling", "mean")


def test_two_plugins_of_one_name_are_an_error(install):
    install(gelora=Poolings("median"))
    with pytest.raises(PluginError, match=r"^The gelora plugin 'gelora' \(gelora:plugin\) does not load"):
        plugins.plugin_manager()


@pytest.mark.parametrize("returned", [None, ["median"], 3])
def test_a_hook_that_fails_is_an_error_that_names_the_plugin(install, returned):
    class Failing:
        @hookimpl
        def register_poolings(self):
            return returned

    install(mine=Failing())
    with pytest.raises(PluginError, match=r"^register_poolings of the gelora plugin 'mine' fails: "):
        plugins.find("pooling", "mean")


def test_a_plugin_that_was_broken_is_looked_at_again(install):
    install(mine=EntryPoint("mine", "no_such_module", "gelora"))
    with pytest.raises(PluginError):
        plugins.plugin_manager()
    install()
    assert callable(plugins.find("pooling", "mean"))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_described_in_sentences(hook):
    text = inspect.getdoc(getattr(hookspecs, hook))
    assert text
    assert text.endswith(".")
    assert len(text.split()) >= 5


@pytest.mark.parametrize("hook", HOOKS)
def test_the_built_ins_implement_every_hook(install, hook):
    install()
    implementations = getattr(plugins.plugin_manager().hook, hook).get_hookimpls()
    assert [(i.plugin_name, i.plugin) for i in implementations] == [("gelora", builtin)]


def test_there_are_hooks_to_check():
    assert set(HOOKS) >= {"register_estimators", "register_poolings", "register_rank_policies", "find_model_layout"}
