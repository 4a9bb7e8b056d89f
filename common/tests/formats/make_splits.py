"""Writes splits.json: listings of folders, and the files of each split that `datasets` finds in them (null where it refuses).

Run it with `datasets` 5 installed: python make_splits.py
"""

import json
import tempfile
from pathlib import Path

from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.load import infer_module_for_data_files
from datasets.packaged_modules import _ALL_ALLOWED_EXTENSIONS, _MODULE_TO_EXTENSIONS
from datasets.utils.metadata import MetadataConfigs

LISTINGS = [
    ["dataset.csv"],
    ["README.md", "train.csv", "test.csv"],
    ["data/train.csv", "data/test.csv"],
    ["train_0.csv", "train_1.csv", "test_0.csv"],
    ["data/train/shard_0.csv", "data/train/shard_1.csv", "data/test/shard_0.csv"],
    ["data/train-00000-of-00003.csv", "data/train-00001-of-00003.csv", "data/test-00000-of-00001.csv", "data/random-00000-of-00003.csv"],
    ["data/train-00000-of-00001-abcdef.parquet", "data/validation-00000-of-00001-abcdef.parquet"],
    ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
    ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
    ["default/train/0000.parquet", "default/test/0000.parquet"],
    ["training.jsonl", "dev.jsonl", "testing.jsonl"],
    ["my-train-file.jsonl", "my-eval-file.jsonl"],
    ["trained.jsonl", "contest.jsonl"],
    ["alpaca_data.json"],
    ["alpaca_data.json", "dataset_info.json", "README.md", ".gitattributes"],
    ["val.json", "valid.json", "evaluation.json"],
    ["a.jsonl", "b.jsonl", "sub/c.jsonl"],
    ["TRAIN.jsonl", "TEST.jsonl"],
    ["train2.jsonl", "test10.jsonl"],
    ["2train3.jsonl"],
    ["train/a.jsonl", "train.jsonl", "test.jsonl"],
    ["a/train/b/c.jsonl", "a/dev/c.jsonl"],
    ["train.jsonl", "notes.txt", "LICENSE"],
    ["a.parquet", "b.json"],
    ["a.parquet", "b.json", "c.json"],
    ["train.jsonl.gz", "test.jsonl.gz"],
    ["train.jsonl.zst"],
    ["__pycache__/train.jsonl", "data.jsonl"],
    [".hidden/train.jsonl", ".train.jsonl", "data.jsonl"],
    ["data/my split-00000-of-00001.parquet"],
    ["data/train-0000-of-0001.parquet"],
    ["data/train-00000-of-00001.parquet", "data/extra.parquet"],
    ["data/train-00000-of-00001.parquet", "test.parquet"],
    ["validation/1.txt", "train-set/1.txt", "old.train/1.txt"],
    ["train-test.jsonl"],
    ["test split.csv", "train split.csv"],
    ["train", "test"],
    ["README.md"],
    ["en/train.jsonl", "de/train.jsonl", "en/dev.jsonl"],
    ["train.csv", "test.json"],
    ["b-train.json", "a-train.json", "train.json", "training.json"],
    ["train/x.jsonl", "eval/x.jsonl", "test.jsonl"],
]

CARDS = [
    ([{"config_name": "default", "data_files": "data.jsonl"}], ["data.jsonl", "other.jsonl"]),
    ([{"config_name": "a", "data_files": ["a/*.jsonl", "b/*.jsonl"]}], ["b/1.jsonl", "a/2.jsonl", "a/1.jsonl", "a/b/3.jsonl"]),
    (
        [
            {"config_name": "en", "data_files": [{"split": "train", "path": "en/train-*"}, {"split": "test", "path": ["en/test.jsonl"]}]},
            {"config_name": "de", "default": True, "data_files": [{"split": "train", "path": "de/**"}]},
        ],
        ["en/train-1.jsonl", "en/train-2.jsonl", "en/test.jsonl", "de/x/1.jsonl", "de/2.jsonl"],
    ),
    ([{"config_name": "sub", "data_dir": "sub"}, {"config_name": "x", "data_files": "x.jsonl"}], ["sub/train.jsonl", "sub/test.jsonl", "x.jsonl"]),
    ([{"config_name": "a", "data_files": "**/[ab]?.jsonl"}], ["a1.jsonl", "s/b2.jsonl", "s/c3.jsonl", "s/t/b10.jsonl"]),
    ([{"config_name": "a", "default": True, "data_files": "1.jsonl"}, {"config_name": "default", "data_files": "1.jsonl"}], ["1.jsonl"]),
    ([{"data_files": "1.jsonl"}], ["1.jsonl"]),
    ([{"config_name": "a", "data_files": [{"split": "a-b", "path": "1.jsonl"}]}], ["1.jsonl"]),
    ([{"config_name": "a", "data_files": [{"split": "s", "path": "1.jsonl"}, {"split": "s", "path": "2.jsonl"}]}], ["1.jsonl", "2.jsonl"]),
    ([{"config_name": "a", "data_files": "missing.jsonl"}], ["1.jsonl"]),
]


def files_of(folder, patterns):
    data_files = DataFilesDict.from_patterns(patterns, base_path=folder.as_posix(), allowed_extensions=_ALL_ALLOWED_EXTENSIONS)
    module, _ = infer_module_for_data_files(data_files)
    data_files = data_files.filter(extensions=_MODULE_TO_EXTENSIONS[module])
    # A file that two patterns of a split match is listed twice there.
    return [[str(split), list(dict.fromkeys(Path(file).relative_to(folder).as_posix() for file in files))] for split, files in data_files.items()]


def in_folder(paths, work):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        try:
            return work(folder)
        except Exception as error:
            print(paths, type(error).__name__, str(error)[:80])
            return None


def listing(folder):
    return files_of(folder, get_data_patterns(folder.as_posix()))


def card(configs):
    class Card(dict):
        pass

    def work(folder):
        found = MetadataConfigs.from_dataset_card_data(Card(configs=configs))
        result = []
        for name, config in found.items():
            base = folder / config.get("data_dir", "")
            files = config.get("data_files")
            patterns = sanitize_patterns(files) if files is not None else get_data_patterns(base.as_posix())
            splits = files_of(base, patterns)
            prefix = config.get("data_dir")
            if prefix:
                splits = [[split, [f"{prefix}/{file}" for file in files]] for split, files in splits]
            result.append([name, name == found.get_default_config_name(), splits])
        return result

    return work


if __name__ == "__main__":
    cases = [{"paths": paths, "splits": in_folder(paths, listing)} for paths in LISTINGS]
    cards = [{"configs": configs, "paths": paths, "found": in_folder(paths, card(configs))} for configs, paths in CARDS]
    with open(Path(__file__).parent / "splits.json", "w") as file:
        json.dump({"listings": cases, "cards": cards}, file, indent=1)
