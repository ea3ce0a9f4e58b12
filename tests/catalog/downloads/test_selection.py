# SPDX-License-Identifier: Apache-2.0
"""Which files of a repository are downloaded."""

import pytest

from xinference.catalog.downloads.selection import RemoteFile, main_file_of, needed_files
from xinference.errors import DownloadFailed


def chosen(*names: str, patterns: tuple[str, ...] = ()) -> set[str]:
    listed = [RemoteFile(path=name, size_bytes=1) for name in names]
    return {file.path for file in needed_files(listed, patterns, model="m")}


TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "tokenizer.model")


def test_of_two_formats_of_the_weights_the_safe_one_is_taken() -> None:
    found = chosen(
        *TEXTS,
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    )

    assert found == {
        *TEXTS,
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "model.safetensors.index.json",
    }


def test_a_repository_that_has_only_the_older_format_is_taken_as_it_is() -> None:
    assert chosen("config.json", "pytorch_model.bin") == {"config.json", "pytorch_model.bin"}


def test_files_of_other_runtimes_and_pictures_stay_where_they_are() -> None:
    found = chosen(
        "config.json",
        "model.safetensors",
        *("model.fp16.safetensors", "consolidated.safetensors", "training_args.bin"),
        *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.Q4_0.gguf"),
        *("onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth"),
        *("README.md", ".gitattributes", "assets/logo.png", "figure.png"),
    )

    assert found == {"config.json", "model.safetensors"}


def test_the_folders_and_heads_of_an_embedding_model_come_along() -> None:
    found = chosen(
        *("modules.json", "config.json", "model.safetensors", "pytorch_model.bin"),
        *("1_Pooling/config.json", "2_Dense/pytorch_model.bin", "2_Dense/config.json"),
        *("sparse_linear.pt", "colbert_linear.pt", "modeling.py"),
    )

    assert "pytorch_model.bin" not in found
    assert {"2_Dense/pytorch_model.bin", "1_Pooling/config.json", "modeling.py"} <= found
    assert {"sparse_linear.pt", "colbert_linear.pt"} <= found


def test_patterns_name_what_is_needed_of_a_repository_of_quantizations() -> None:
    names = ("m-q4_0-00001-of-00002.gguf", "m-q4_0-00002-of-00002.gguf", "m-q8_0.gguf", "README.md")

    assert chosen(*names, patterns=("*q4_0*.gguf",)) == set(names[:2])
    assert main_file_of(reversed(names), "*q4_0*.gguf") == names[0]


def test_a_pattern_that_matches_nothing_is_told() -> None:
    with pytest.raises(DownloadFailed, match=r"no file that matches .*q2_k"):
        chosen("m-q8_0.gguf", patterns=("*q8_0*.gguf", "*q2_k*.gguf"))


def test_a_repository_without_a_model_is_refused() -> None:
    with pytest.raises(DownloadFailed, match="no file that is needed"):
        chosen("README.md", "picture.png")


@pytest.mark.parametrize("name", ["../outside.json", "/etc/config.json", "a/../../b.json", "a\\b"])
def test_a_name_that_leads_out_of_the_directory_is_refused(name: str) -> None:
    with pytest.raises(DownloadFailed, match="lists a file named"):
        chosen("config.json", name)
