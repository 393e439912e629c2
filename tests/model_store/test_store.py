"""What every store promises, wherever it lies."""

from __future__ import annotations

import shutil
import threading

import pytest

from model_store.errors import AliasInvalid, FileRefused, ModelNotFound, VersionNotFound
from model_store.manifest import ADVANCE, BEGIN, PREDICT, STEP
from model_store.store import open_store, select
from tests.toy_version import TOY_SPEC, toy_version
from traces.spec import RoutingSpec


def test_a_published_version_comes_back_byte_for_byte(store, toys):
    draft, graphs = toys[0]
    published = store.publish(draft, graphs)

    stored = store.load("toy", 1)
    assert stored.graphs == graphs
    assert stored.manifest == published


def test_a_version_with_steps_comes_back_with_them(store):
    draft, graphs = toy_version(steps=True)
    store.publish(draft, graphs)
    assert store.load("toy", 1).graphs == graphs
    assert set(store.manifest("toy", 1).files) == {PREDICT, ADVANCE, BEGIN, STEP}


def test_the_manifest_says_what_the_draft_said(store, toys):
    published = store.publish(*toys[0])
    assert {name: getattr(published, name) for name in type(toys[0][0]).model_fields} == dict(toys[0][0])


def test_versions_count_up_from_one(store, toys):
    assert [store.publish(*toy).version for toy in toys] == [1, 2]
    assert store.versions("toy") == [1, 2]


def test_models_are_listed_by_name(store, toys):
    for name in ("b-model", "a-model"):
        spec = RoutingSpec(name, TOY_SPEC.num_layers, TOY_SPEC.num_experts, TOY_SPEC.top_k)
        store.publish(toys[0][0].model_copy(update={"spec": spec}), *toys[0][1:])
    assert store.models() == ["a-model", "b-model"]


def test_without_an_alias_the_newest_version_is_meant(store, toys):
    for toy in toys:
        store.publish(*toy)
    assert store.resolve("toy") == 2


def test_production_is_meant_where_nothing_is_said(store, toys):
    store.publish(*toys[0], aliases=["production"])
    store.publish(*toys[1])
    assert store.resolve("toy") == 1


@pytest.mark.parametrize("selector", [1, "1", "candidate"])
def test_a_version_is_found_by_number_or_alias(store, toys, selector):
    store.publish(*toys[0], aliases=["candidate"])
    store.publish(*toys[1])
    assert store.resolve("toy", selector) == 1


@pytest.mark.parametrize("selector", [2, "2", 0, -1, "candidate"])
def test_an_unknown_version_is_told_beside_the_known_ones(store, toys, selector):
    store.publish(*toys[0], aliases=["production"])
    with pytest.raises(VersionNotFound, match=r"toy has no .*Choose one of 1, production"):
        store.resolve("toy", selector)


def test_an_alias_whose_version_was_deleted_says_so():
    with pytest.raises(VersionNotFound, match=r"toy has no alias 'production' \(it points to version 3\)"):
        select("toy", None, [1, 2], {"production": 3})


@pytest.mark.parametrize("selector", ["../1", "Production", "", "1.0", "-1", "a" * 64])
def test_a_word_that_cannot_be_an_alias_is_refused(selector):
    with pytest.raises(AliasInvalid, match="cannot be an alias"):
        select("toy", selector, [1], {})


def test_an_alias_moves_and_goes(store, toys):
    for toy in toys:
        store.publish(*toy, aliases=["production"])
    assert store.aliases("toy") == {"production": 2}
    store.set_alias("toy", "production", 1)
    store.set_alias("toy", "candidate", 2)
    assert store.aliases("toy") == {"candidate": 2, "production": 1}
    store.remove_alias("toy", "candidate")
    assert store.aliases("toy") == {"production": 1}


def test_an_alias_cannot_point_to_a_version_that_is_not_there(store, toys):
    store.publish(*toys[0])
    with pytest.raises(VersionNotFound, match="toy has no version 5"):
        store.set_alias("toy", "production", 5)


def test_removing_an_alias_that_is_not_there_names_those_that_are(store, toys):
    store.publish(*toys[0], aliases=["production"])
    with pytest.raises(VersionNotFound, match=r"no alias 'candidate'.*production"):
        store.remove_alias("toy", "candidate")


def test_a_bad_alias_is_refused_before_anything_is_published(store, toys):
    store.publish(*toys[0])
    with pytest.raises(AliasInvalid):
        store.publish(*toys[1], aliases=["Production"])
    assert store.versions("toy") == [1]


def test_an_unknown_model_is_told_beside_the_known_ones(store, toys):
    store.publish(*toys[0])
    with pytest.raises(ModelNotFound, match=r"No version of other in .*It holds: toy"):
        store.versions("other")


@pytest.mark.parametrize("model", ["..", "../toy", "toy/..", "", ".hidden", "a" * 101, "toy\n"])
@pytest.mark.parametrize("ask", ["versions", "aliases", "resolve"])
def test_a_model_name_that_is_a_path_is_no_model(tmp_path, model, ask):
    with pytest.raises(ModelNotFound, match="is no model name"):
        getattr(open_store(tmp_path), ask)(model)


@pytest.mark.parametrize("version", [0, -1, 2])
def test_a_version_that_is_not_there_does_not_load(store, toys, version):
    store.publish(*toys[0])
    with pytest.raises(VersionNotFound, match=f"toy has no version {version}"):
        store.load("toy", version)


def test_an_empty_graph_is_not_published(store, toys):
    with pytest.raises(FileRefused, match=r"predict\.onnx has 0 bytes"):
        store.publish(toys[0][0], toys[0][1] | {PREDICT: b""})


def test_publishers_at_once_each_get_their_own_number(store, toys):
    store.publish(*toys[0])
    at_once = threading.Barrier(4)
    got: list[int] = []

    def publish(turn: int) -> None:
        at_once.wait()
        got.append(store.publish(*toys[turn % 2]).version)

    threads = [threading.Thread(target=publish, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(set(got)) and len(got) == 4
    assert all(store.load("toy", version) for version in store.versions("toy"))


def test_aliases_set_at_once_are_all_kept(store, toys):
    store.publish(*toys[0])
    names = [f"alias-{number}" for number in range(4)]
    threads = [threading.Thread(target=store.set_alias, args=("toy", name, 1)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.aliases("toy") == dict.fromkeys(names, 1)


def test_a_number_that_an_alias_remembers_is_not_given_again(store, toys, request):
    for toy in toys:
        store.publish(*toy)
    store.set_alias("toy", "production", 2)
    _delete_version(store, request, 2)
    assert store.publish(*toys[0]).version == 3


def test_the_default_store_is_the_one_shipped():
    assert open_store().location.endswith("model_store/bundled")


def _delete_version(store, request, version: int) -> None:
    if store.location.startswith("s3://"):
        request.getfixturevalue("bucket").objects.filter(Prefix=f"some/prefix/toy/{version}/").delete()
        return
    shutil.rmtree(f"{store.location}/toy/{version}")
