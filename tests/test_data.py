"""Sources, samples and the place in the stream that a run can go on from."""

import json
from io import BytesIO
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import webdataset
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from dino_projector.pictures import Record, read_picture, to_bytes
from dino_projector.training import sources
from dino_projector.training.samples import (
    Crop,
    SampleStream,
    Sampling,
    crop_with_margin,
    draw_crop,
    first_pairs,
    make_pair,
)
from dino_projector.training.sources import (
    ImageFolder,
    ListedDataset,
    Shards,
    StreamedDataset,
    check_shards,
    open_dataset,
)
from tiny_models import ROOT, tiny_pipeline


PROCESSOR = VaeImageProcessor(vae_scale_factor=16)
SAMPLING = Sampling(64, (2.0, 4.0), ("bicubic", "mild"))
NUM_PICTURES = 7


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """datasets sleeps after every streamed epoch, to let threads end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def photo(width=120, height=100):
    return Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((width, height))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven usable pictures in nested folders, a broken one and one that is too small, some with captions."""
    root = tmp_path_factory.mktemp("photos")
    names = ["a.png", "b.jpg", "in/c.webp", "in/d.bmp", "in/deeper/e.tif", "in/deeper/f.gif", "g.JPEG"]
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(100 + 5 * index, 130).save(path)
    (root / "broken.jpg").write_bytes((root / "b.jpg").read_bytes()[:400])
    photo(40, 200).save(root / "small.png")
    (root / "notes.md").write_text("no picture")
    (root / "a.txt").write_text("two dogs\n")
    (root / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": "c.webp", "text": "three dogs"}) + "\n")
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp", ".bmp", ".gif"))
    for shard in range(2):
        with webdataset.TarWriter(str(root / f"s-{shard}.tar")) as writer:
            for path in pictures[shard::2]:
                caption = f"caption of {path.stem}"
                writer.write({"__key__": path.stem, path.suffix[1:]: path.read_bytes(), "txt": caption})
    return str(root / "s-{0..1}.tar")


@pytest.fixture(scope="module")
def dataset_folder(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp"))
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "title": f"a {path.stem}"} for path in paths]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    for shard in range(2):
        dataset.shard(2, shard).to_parquet(root / f"train-{shard}.parquet")
    return str(root)


def take(source, count, part=0, parts=1, **options):
    stream = SampleStream(source, SAMPLING._replace(**options), PROCESSOR, 0, part, parts)
    return list(islice(stream, count))


# ---- Sources -------------------------------------------------------------------------------------------------------


def test_folder_is_searched_with_its_subfolders_and_captions(folder):
    source = ImageFolder(folder, 0)
    captions = {path.name: caption for path, caption in zip(source.paths, source.captions())}
    assert len(source) == NUM_PICTURES + 2
    assert captions.pop("a.png") == "two dogs" and captions.pop("c.webp") == "three dogs"
    assert set(captions.values()) == {""}
    assert set(ImageFolder(folder, 0, None).captions()) == {""}


def test_an_epoch_has_every_usable_picture_once_and_names_the_others(folder, capfd):
    samples = take(ImageFolder(folder, 0), 2 * NUM_PICTURES)
    first, second = ([sample["name"] for sample in samples[start:][:NUM_PICTURES]] for start in (0, NUM_PICTURES))
    assert len(set(first)) == NUM_PICTURES and set(first) == set(second) and first != second
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2
    assert any("broken.jpg: skipped" in line for line in errors)
    assert any("small.png: skipped, has 40x200 px, less than --resolution 64" in line for line in errors)


def test_metadata_must_be_json_lines(tmp_path):
    photo().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"name": 3}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: no JSON object with a `file_name`"):
        ImageFolder(tmp_path, 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_are_utf_8_with_and_without_a_byte_order_mark(tmp_path, encoding):
    for name in ("a.png", "b.png", "c.png"):
        photo().save(tmp_path / name)
    (tmp_path / "a.txt").write_text("ein Hündchen\n", encoding=encoding)
    # A blank line, and a separator that is a line's end to Python only.
    rows = [{"file_name": "b.png", "text": "two\u2028dogs"}, None, {"file_name": "c.png", "text": "three"}]
    lines = ["" if row is None else json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "", ""]), encoding=encoding)
    assert ImageFolder(tmp_path, 0).captions() == ["ein Hündchen", "two\u2028dogs", "three"]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        caption = (tmp_path / "a.txt").read_bytes()
        writer.write({"__key__": "a", "png": (tmp_path / "a.png").read_bytes(), "txt": caption})
    (record,) = Shards(str(tmp_path / "a.tar"), 0).epoch_records(0, 0, 1, 0)
    assert record.caption == "ein Hündchen"


def test_metadata_of_another_encoding_is_refused(tmp_path):
    photo().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}', encoding="utf-16")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: must be UTF-8"):
        ImageFolder(tmp_path, 0)


def test_a_photo_counts_once_however_many_links_lead_to_it(tmp_path):
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (root / "a.png", root / "in" / "b.png", elsewhere / "c.png"):
        path.parent.mkdir(exist_ok=True)
        photo().save(path)
    (elsewhere / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "three dogs"}\n')
    (root / "self").symlink_to(".")
    (root / "in" / "up").symlink_to(root)
    (root / "again").symlink_to("in")
    (root / "a_too.png").symlink_to("a.png")
    for name in ("first", "second"):
        (root / name).symlink_to(elsewhere)
    source = ImageFolder(root, 0)
    assert [str(path.relative_to(root)) for path in source.paths] == ["a.png", "first/c.png", "in/b.png"]
    assert source.captions() == ["", "three dogs", ""]


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path, capfd):
    photo().save(tmp_path / "a.png")
    photo().save(tmp_path / "b.tga")
    for name in ("c.heic", "d.NEF", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in ImageFolder(tmp_path, 0).paths] == ["a.png", "b.tga"]
    line = capfd.readouterr().err
    assert "c.heic" in line and "d.NEF" in line and "notes.txt" not in line and line.count("\n") == 1


def test_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no pictures"):
        ImageFolder(tmp_path, 0)


def test_only_unreadable_pictures_end_the_stream(tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"100 pictures in a row cannot be used, the last is .*a\.png"):
        take(ImageFolder(tmp_path, 0), 1)
    assert capfd.readouterr().err.count("skipped, is not a picture that Pillow can read") == 1


def test_dataset_gives_pictures_and_captions(dataset_folder):
    source = open_dataset(dataset_folder, None, "train", False, "image", "title", 0)
    assert isinstance(source, ListedDataset)
    samples = take(source, 3)
    assert {sample["caption"] for sample in samples} <= set(source.captions())
    assert all(sample["name"].startswith(sample["caption"].removeprefix("a ")) for sample in samples)


def test_dataset_without_a_caption_column_has_no_captions(dataset_folder):
    source = open_dataset(dataset_folder, None, "train", False, "image", None, 0)
    assert source.captions() == [] and source.record(0).caption == ""


def test_streamed_dataset_has_the_same_pictures(dataset_folder):
    source = open_dataset(dataset_folder, None, "train", True, "image", "title", 0)
    assert isinstance(source, StreamedDataset)
    listed = open_dataset(dataset_folder, None, "train", False, "image", "title", 0)
    assert sorted(record.caption for record in source.epoch_records(0, 0, 1, 0)) == sorted(listed.captions())


def test_columns_are_checked(dataset_folder):
    for column, message in (("photo", "has the columns image, title"), ("title", "not pictures")):
        with pytest.raises(ValueError, match=f"--image_column {column}: .*{message}"):
            open_dataset(dataset_folder, None, "train", False, column, None, 0)


def test_shards_give_pictures_and_captions(shards):
    samples = take(Shards(shards, 0), 5)
    assert all(sample["caption"] == f"caption of {sample['name'].split(': ')[1]}" for sample in samples)
    names = {record.name for part in (0, 1) for record in Shards(shards, 0).epoch_records(3, part, 2, 0)}
    assert names == {record.name for record in Shards(shards, 0).epoch_records(0, 0, 1, 0)} and len(names) == 7


def test_a_broken_shard_is_reported_and_skipped(shards, tmp_path, capfd):
    whole = Path(shards.replace("{0..1}", "1")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.tar").write_bytes(whole)
    records = list(Shards(str(tmp_path / "{cut,whole}.tar"), 0).epoch_records(0, 0, 1, 0))
    assert sum("whole.tar" in record.name for record in records) == 3
    assert 0 < sum("cut.tar" in record.name for record in records) < 3
    errors = capfd.readouterr().err.splitlines()
    assert errors and all("the rest of a broken shard is skipped: " in line and "cut.tar" in line for line in errors)


def test_missing_and_empty_shards_end_the_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        next(Shards(str(tmp_path / "a.tar"), 0).epoch_records(0, 0, 1, 0))
    webdataset.TarWriter(str(tmp_path / "a.tar")).close()
    with pytest.raises(ValueError, match=r"a\.tar: no samples in these shards"):
        next(Shards(str(tmp_path / "a.tar"), 0).epoch_records(0, 0, 1, 0))


@pytest.mark.parametrize("kind", ["shards", "streamed"])
def test_more_readers_than_shards_are_refused(shards, dataset_folder, kind):
    source = (
        Shards(shards, 0) if kind == "shards" else open_dataset(dataset_folder, None, "train", True, "image", None, 0)
    )
    check_shards(source, 1, 2)
    with pytest.raises(ValueError, match="2 shards cannot be shared by 3 readers"):
        check_shards(source, 1, 3)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 5))
def test_readers_share_the_sequence_of_a_listed_source(count, parts, start):
    """Taken turn by turn, the readers' pictures are those of a single reader."""

    class Numbers(sources.ListedSource):
        def __len__(self):
            return count

        def record(self, index):
            return index

    def sequence(part, parts, length):
        records = (r for epoch in range(200) for r in Numbers(3).epoch_records(epoch, part, parts, 0))
        return list(islice(records, length))

    readers = [sequence(part, parts, 20) for part in range(parts)]
    assert [item for turn in zip(*readers) for item in turn] == sequence(0, 1, 20 * parts)
    assert list(Numbers(3).epoch_records(1, 0, 1, start)) == list(Numbers(3).epoch_records(1, 0, 1, 0))[start:]


# ---- Samples -------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_the_number_of_readers(folder):
    alone = take(ImageFolder(folder, 0), 10)
    shared = {s["number"]: s for part in range(3) for s in take(ImageFolder(folder, 0), 5, part, 3)}
    for sample in alone:
        other = shared[sample["number"]]
        assert other["name"] == sample["name"]
        assert torch.equal(other["degraded"], sample["degraded"]) and torch.equal(other["sharp"], sample["sharp"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards", "dataset", "streamed"])
def test_a_loader_goes_on_where_it_was(folder, shards, dataset_folder, kind, workers):
    def loader():
        source = {
            "folder": lambda: ImageFolder(folder, 0),
            "shards": lambda: Shards(shards, 0),
            "dataset": lambda: open_dataset(dataset_folder, None, "train", False, "image", "title", 0),
            "streamed": lambda: open_dataset(dataset_folder, None, "train", True, "image", "title", 0),
        }[kind]()
        return StatefulDataLoader(SampleStream(source, SAMPLING, PROCESSOR, 0), batch_size=2, num_workers=workers)

    first = loader()
    batches = iter(first)
    # Beyond the first epoch, and no multiple of the workers.
    for _ in range(7):
        next(batches)
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    for wanted, found in zip(islice(batches, 3), second):
        assert wanted["name"] == found["name"] and wanted["number"].tolist() == found["number"].tolist()
        assert torch.equal(wanted["degraded"], found["degraded"])


def test_fixed_crops_stay_while_the_degradation_changes(folder):
    by_name = {}
    for sample in take(ImageFolder(folder, 0), 3 * NUM_PICTURES, fixed_crops=True):
        by_name.setdefault(sample["name"], []).append(sample)
    for samples in by_name.values():
        assert all(torch.equal(sample["sharp"], samples[0]["sharp"]) for sample in samples)
        assert not all(torch.equal(sample["degraded"], samples[0]["degraded"]) for sample in samples)


@given(st.integers(64, 400), st.integers(64, 400), st.integers(0, 2**32))
def test_crops_lie_inside_and_reach_from_the_whole_picture_to_its_pixels(width, height, seed):
    sampling = SAMPLING._replace(random_flip=True)
    crop = draw_crop((width, height), sampling, np.random.default_rng(seed))
    assert 64 / min(width, height) <= crop.shrink * (1 + 1e-9) and crop.shrink <= 1
    assert 0 <= crop.left <= max(64, round(width * crop.shrink)) - 64
    assert 0 <= crop.top <= max(64, round(height * crop.shrink)) - 64


def test_scales_and_flips_vary():
    crops = [draw_crop((400, 300), SAMPLING._replace(random_flip=True), np.random.default_rng(i)) for i in range(200)]
    shrinks = [crop.shrink for crop in crops]
    assert min(shrinks) < 0.25 and max(shrinks) > 0.9
    assert 60 < sum(crop.is_flipped for crop in crops) < 140


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize(("left", "top"), [(0, 0), (20, 30), (56, 36)])
def test_a_crop_with_a_margin_is_that_of_the_shrunk_picture(left, top, is_flipped):
    picture = photo()
    region, (x, y) = crop_with_margin(picture, Crop(1.0, left, top, is_flipped), 64, 16)
    wanted = picture.crop((left, top, left + 64, top + 64))
    if is_flipped:
        wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert region.crop((x, y, x + 64, y + 64)).tobytes() == wanted.tobytes()
    assert region.width == 64 + min(16, left) + min(16, 120 - 64 - left)


def test_pictures_are_turned_upright_and_deep_ones_refused(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    photo(120, 100).save(tmp_path / "turned.jpg", exif=exif)
    turned = read_picture(Record("", tmp_path / "turned.jpg", ""))
    assert turned.size == (100, 120)
    np.testing.assert_array_equal(turned, load_image(str(tmp_path / "turned.jpg")))
    Image.fromarray(np.full((70, 70), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="16 or 32 bits"):
        read_picture(Record("", tmp_path / "deep.png", ""))


def test_training_prepares_the_picture_as_inference_does(folder):
    """The whole of a picture of the crop's size: DINO's features are those of `encode_dino` for the small picture."""
    pipe = tiny_pipeline(dino="dinov2_with_registers")
    path = folder / "square.ppm"
    photo(64, 64).save(path)
    record = Record("", path, "")
    pair = make_pair(record, SAMPLING, pipe.image_processor, np.random.default_rng(0), np.random.default_rng(0))
    path.unlink()
    seen = torch.from_numpy(np.array(pair.degraded)).permute(2, 0, 1).float() / 255
    wanted = pipe.encode_dino(pair.small, height=64, width=64)
    torch.testing.assert_close(pipe.encode_dino(seen, height=64, width=64), wanted)
    assert torch.equal(to_bytes(pair.degraded), pipe.prepare_image(pair.small, 64, 64)[0])


@pytest.mark.parametrize("seed", range(6))
def test_a_pair_is_a_tile_of_the_enlarged_picture_and_the_same_place_sharp(seed):
    """Inside a larger picture, mirrored or not: what DINO sees is enlarged with its surroundings and then cut."""
    picture = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB")
    file = BytesIO()
    picture.save(file, "PNG")
    sampling = Sampling(64, (2.0, 2.0), ("bicubic",), random_flip=True)
    record, rngs = Record("", file.getvalue(), ""), [np.random.default_rng(seed) for _ in range(3)]
    pair = make_pair(record, sampling, PROCESSOR, rngs[0], rngs[1])
    region, (left, top) = crop_with_margin(picture, draw_crop(picture.size, sampling, rngs[2]), 64, sampling.margin)
    whole = PROCESSOR.resize(pair.small, region.height, region.width)
    assert pair.degraded.tobytes() == whole.crop((left, top, left + 64, top + 64)).tobytes()
    sharp, degraded = (np.asarray(item).astype(float) for item in (pair.sharp, pair.degraded))
    moved = [np.abs(np.roll(degraded, shift, (0, 1)) - sharp)[4:-4, 4:-4].mean() for shift in ((2, 0), (0, 2))]
    assert np.abs(degraded - sharp)[4:-4, 4:-4].mean() < min(moved)


def test_a_crop_sees_what_lies_around_it():
    """Enlarging a whole picture and cutting a tile is not the same as enlarging the tile alone."""
    image = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB")
    region, (x, y) = crop_with_margin(image, Crop(1.0, 80, 90, False), 64, 32)
    small = region.resize((region.width // 4, region.height // 4), Image.Resampling.BICUBIC)
    box = (x, y, x + 64, y + 64)
    whole = np.asarray(PROCESSOR.resize(small, region.height, region.width).crop(box)).astype(int)
    alone = np.asarray(PROCESSOR.resize(small.crop([side // 4 for side in box]), 64, 64)).astype(int)
    assert np.abs(whole - alone)[:, [0, -1]].mean() > 2 * np.abs(whole - alone)[16:48, 16:48].mean()


def test_first_pairs_are_always_the_same_and_skip_broken_ones(folder):
    first, second = (first_pairs(ImageFolder(folder, 5), 99, SAMPLING, PROCESSOR, 0) for _ in range(2))
    assert len(first) == NUM_PICTURES
    assert all(a.degraded.tobytes() == b.degraded.tobytes() for a, b in zip(first, second))
    assert all(pair.small.width == pytest.approx(64 / 3, abs=11) for pair in first)
