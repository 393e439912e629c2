"""A store on S3, over a socket: a version is there when its manifest is."""

from __future__ import annotations

import sys

import pytest

from model_store.errors import ChecksumMismatch, FileRefused, PublishConflict, StoreUnavailable
from model_store.manifest import ADVANCE
from model_store.s3 import MAX_ATTEMPTS, S3Store
from model_store.store import broken, open_store
from tests.model_store.conftest import BUCKET


@pytest.fixture
def store(bucket):
    return open_store(f"s3://{BUCKET}")


def test_keys_follow_the_layout_of_a_folder(store, bucket, toys):
    store.publish(*toys[0], aliases=["production"])
    assert sorted(entry.key for entry in bucket.objects.all()) == [
        "toy/1/advance.onnx",
        "toy/1/manifest.json",
        "toy/1/predict.onnx",
        "toy/aliases.json",
    ]


def test_a_version_without_its_manifest_is_none(store, bucket, toys):
    store.publish(*toys[0])
    bucket.put_object(Key="toy/2/predict.onnx", Body=b"half")
    assert store.versions("toy") == [1]


def test_a_number_begun_by_a_crashed_publisher_is_not_given_again(store, bucket, toys):
    store.publish(*toys[0])
    bucket.put_object(Key="toy/2/predict.onnx", Body=b"half")
    assert store.publish(*toys[1]).version == 3
    assert store.load("toy", 3).graphs == toys[1][1]


def test_a_number_taken_meanwhile_is_skipped_and_left_alone(store, toys, monkeypatch):
    store.publish(*toys[0])
    # Another published between our look at the numbers and our first write.
    monkeypatch.setattr(S3Store, "_keys", _seen_nothing_once(S3Store._keys))
    assert store.publish(*toys[1]).version == 2
    assert store.load("toy", 1).graphs == toys[0][1]


def test_a_storm_of_publishers_ends_in_an_error(store, bucket, toys, monkeypatch):
    for number in range(1, MAX_ATTEMPTS + 1):
        bucket.put_object(Key=f"toy/{number}/predict.onnx", Body=b"theirs")
    monkeypatch.setattr(S3Store, "_keys", _seen_nothing_once(S3Store._keys))
    with pytest.raises(PublishConflict, match="Versions 1 to 10 of toy were taken"):
        store.publish(*toys[0])


def test_aliases_changed_meanwhile_are_read_again(store, toys, monkeypatch):
    store.publish(*toys[0], aliases=["production"])
    stale = store._tagged_aliases("toy")
    store.set_alias("toy", "theirs", 1)
    fresh, answers = S3Store._tagged_aliases, [stale]
    monkeypatch.setattr(
        S3Store, "_tagged_aliases", lambda self, model: answers.pop() if answers else fresh(self, model)
    )
    store.set_alias("toy", "ours", 1)
    assert store.aliases("toy") == {"ours": 1, "production": 1, "theirs": 1}


def test_a_changed_object_is_noticed(store, bucket, toys):
    store.publish(*toys[0])
    bucket.put_object(Key="toy/1/advance.onnx", Body=b"x" * len(toys[0][1][ADVANCE]))
    with pytest.raises(ChecksumMismatch, match=rf"s3://{BUCKET}/toy/1/advance\.onnx has sha256"):
        store.load("toy", 1)


def test_a_missing_object_is_named(store, bucket, toys):
    store.publish(*toys[0])
    bucket.Object("toy/1/predict.onnx").delete()
    assert [type(error) for _, error in broken(store, "toy")] == [FileRefused]


def test_an_object_above_the_limit_is_not_read(store, toys, monkeypatch):
    store.publish(*toys[0])
    monkeypatch.setattr("model_store.s3.MAX_FILE_BYTES", 100)
    with pytest.raises(FileRefused, match=r"predict\.onnx has \d+ bytes, expected 100 at most"):
        store.load("toy", 1)


def test_prefixes_are_stores_of_their_own(bucket, toys):
    open_store(f"s3://{BUCKET}/a").publish(*toys[0])
    open_store(f"s3://{BUCKET}/ab").publish(*toys[0])
    assert open_store(f"s3://{BUCKET}/a/").versions("toy") == [1]


def test_a_bucket_that_is_not_there_says_so(bucket):
    with pytest.raises(StoreUnavailable, match=r"s3://no-such-bucket cannot be used.*Check the bucket"):
        open_store("s3://no-such-bucket").models()


def test_a_server_that_is_not_there_says_so(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        open_store(f"s3://{BUCKET}").models()


@pytest.mark.parametrize("location", ["s3://", "s3://UPPER/x", "s3://bucket//x", "s3://b", "s3://bucket/a b"])
def test_a_location_that_is_none_is_refused(location):
    with pytest.raises(StoreUnavailable, match="no location on S3"):
        open_store(location)


def test_without_boto3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "model_store.s3")
    with pytest.raises(StoreUnavailable, match=r"needs boto3.*'\.\[s3\]'"):
        open_store(f"s3://{BUCKET}")


def _seen_nothing_once(keys):
    calls = []

    def once(self, below):
        calls.append(below)
        return iter(()) if len(calls) == 1 else keys(self, below)

    return once
