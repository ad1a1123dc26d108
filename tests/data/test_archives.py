"""Members come one by one from folders, tars and zips; hostile and damaged archives end in a message."""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile

import pytest

from lra.data import archives
from lra.data.archives import is_archive, members
from lra.errors import UserError

FILES = {"a/b/c.txt": b"deep" * 300, "a/x.bin": bytes(range(256)) * 40, "empty": b"", "z.txt": b"last"}
MODES = {"t.tar": "w", "t.tar.gz": "w:gz", "release.gz": "w:gz", "t.tbz": "w:bz2", "t.xz": "w:xz"}


def write_tar(path, files=FILES, mode="w", prefix="", extra=()):
    """`extra`: TarInfo objects of members without content, put first."""
    with tarfile.open(path, mode) as archive:
        for member in extra:
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, files=FILES, prefix="", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(prefix + name) if method is None else prefix + name, content)
    return path


def write_folder(path, files=FILES):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def everything(name):
    return True


def read(path, wanted=everything, **limits):
    return list(members(path, wanted, **limits))


@pytest.mark.parametrize("prefix", ["", "./", "./././"])
@pytest.mark.parametrize("name", [*MODES, "t.zip", "zip-without-suffix"])
def test_every_archive_gives_its_members_as_stored_without_a_leading_dot(tmp_path, name, prefix):
    backwards = dict(reversed(FILES.items()))
    if name in MODES:
        path = write_tar(tmp_path / name, backwards, MODES[name], prefix)
    else:
        path = write_zip(tmp_path / name, backwards, prefix)
    assert is_archive(path)
    assert read(path) == list(backwards.items())
    assert read(path, lambda name: name.startswith("a/")) == list(backwards.items())[2:]


def test_a_folder_gives_its_files_sorted_by_their_whole_names(tmp_path):
    files = {"b/1": b"1", "a-b/1": b"2", "a/2": b"3", "a/10": b"4", "c": b"5"}
    assert read(write_folder(tmp_path, files)) == sorted(files.items())
    assert not is_archive(tmp_path)


def test_folders_among_the_members_are_passed_over(tmp_path):
    path = write_tar(tmp_path / "t.tar", extra=[special("a", tarfile.DIRTYPE)])
    assert read(path) == list(FILES.items())
    zipped = write_zip(tmp_path / "t.zip", {"a/": b"", **FILES})
    assert read(zipped) == list(FILES.items())


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_come_whole(tmp_path, format):
    name = "/".join(["f" * 60] * 3) + "/ü.txt"
    with tarfile.open(tmp_path / "t.tar", "w", format=format) as archive:
        member = tarfile.TarInfo(name)
        member.size = 2
        archive.addfile(member, io.BytesIO(b"ok"))
    assert read(tmp_path / "t.tar") == [(name, b"ok")]


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"text\n" * 200, gzip.compress(b"text\n" * 9, mtime=0), b"PAR1" + b"\0" * 600, b"\0" * 2000],
)
def test_what_is_no_archive_is_not_taken_for_one(tmp_path, content):
    (tmp_path / "file.tar.gz").write_bytes(content)
    assert not is_archive(tmp_path / "file.tar.gz")
    with pytest.raises(
        UserError, match="file.tar.gz cannot be read: it is neither a folder nor a tar or zip"
    ):
        read(tmp_path / "file.tar.gz")


def test_a_place_that_does_not_exist_is_named(tmp_path):
    assert not is_archive(tmp_path / "none")
    with pytest.raises(UserError, match="none: there is no such file or folder"):
        read(tmp_path / "none")


@pytest.mark.parametrize("write", [write_tar, write_zip])
@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "./../x", "a/..", "..\\x", "\\x", "a\\..\\x"]
)
def test_a_name_that_leads_out_is_refused_even_where_it_is_not_wanted(tmp_path, write, name):
    path = write(tmp_path / "archive", {name: b"!", "fine": b"ok"})
    with pytest.raises(UserError, match="leads out of the archive"):
        read(path, lambda name: name == "fine")


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_dots_within_a_name_are_ordinary(tmp_path, write):
    assert read(write(tmp_path / "archive", {"a..b/...c": b"ok"})) == [("a..b/...c", b"ok")]


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wanted_link_or_device_in_a_tar_is_refused_and_an_unwanted_one_passed_over(tmp_path, kind):
    path = write_tar(tmp_path / "t.tar", extra=[special("odd", kind, "/etc/passwd")])
    with pytest.raises(UserError, match="'odd' is a link, a device or sparse"):
        read(path)
    assert read(path, lambda name: name != "odd") == list(FILES.items())


def test_a_hard_link_to_a_member_is_refused_too(tmp_path):
    with tarfile.open(write_tar(tmp_path / "t.tar"), "a") as archive:
        archive.addfile(special("again", tarfile.LNKTYPE, "z.txt"))
    with pytest.raises(UserError, match="'again' is a link"):
        read(tmp_path / "t.tar")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_a_wanted_link_or_device_in_a_zip_is_refused(tmp_path, kind):
    member = zipfile.ZipInfo("odd")
    member.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr(member, "/etc/passwd")
        archive.writestr("fine", b"ok")
    with pytest.raises(UserError, match="'odd' is a link or device"):
        read(tmp_path / "t.zip")
    assert read(tmp_path / "t.zip", lambda name: name == "fine") == [("fine", b"ok")]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_method_that_cannot_be_bounded_is_refused(tmp_path, method):
    with pytest.raises(UserError, match=f"compressed by method {method}, not deflate"):
        read(write_zip(tmp_path / "t.zip", method=method))


def test_an_encrypted_member_is_refused(tmp_path):
    path = write_zip(tmp_path / "t.zip", {"secret": b"text"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="'secret' is encrypted"):
        read(path)


@pytest.mark.parametrize("write", [write_tar, write_zip, write_folder])
def test_sizes_over_the_limits_are_refused(tmp_path, write):
    path = write(tmp_path / "source", {"a": b"x" * 5000, "b": b"y" * 5000, "c": b"z" * 5000})
    assert len(read(path, max_member=5000, max_total=18_432)) == 3
    with pytest.raises(UserError, match="'a' has 5,000 bytes, more than the 4,999"):
        read(path, max_member=4999)
    seen = members(path, everything, max_total=11_300)
    assert [next(seen)[0], next(seen)[0]] == ["a", "b"]
    with pytest.raises(UserError, match="more than the 11,300 bytes"):
        next(seen)


def test_a_tar_that_declares_too_much_is_refused_before_anything_is_unpacked(tmp_path):
    member = tarfile.TarInfo("huge")
    member.size = 1 << 40
    (tmp_path / "t.tar").write_bytes(member.tobuf() + b"\0" * 1024)
    for wanted in (everything, lambda name: False):
        with pytest.raises(UserError, match="unpacks to more than"):
            read(tmp_path / "t.tar", wanted)
    member.size = 1 << 31
    (tmp_path / "t.tar").write_bytes(member.tobuf() + b"\0" * 1024)
    with pytest.raises(UserError, match="'huge' has 2,147,483,648 bytes, more than"):
        read(tmp_path / "t.tar")


def test_a_tar_header_that_declares_a_huge_name_is_refused(tmp_path):
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        member = special("n", kind)
        member.size = 1 << 33
        (tmp_path / "t.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"n" * 4096)
        with pytest.raises(UserError, match="cannot be read as an archive .*8,589,934,592 bytes"):
            read(tmp_path / "t.tar")


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_a_bomb_of_padding_behind_the_end_of_a_tar_stops_at_the_limit(tmp_path, opener):
    with opener(tmp_path / "bomb", "wb") as file:
        file.write(write_tar(tmp_path / "t.tar").read_bytes())
        for _ in range(20):
            file.write(b"\0" * (1 << 20))
    with pytest.raises(UserError, match="unpacks to more than the 4,194,304 bytes"):
        read(tmp_path / "bomb", max_total=1 << 22)


def test_a_zip_that_declares_less_than_it_holds_is_refused_without_unpacking_it(tmp_path):
    path = write_zip(tmp_path / "bomb.zip", {"bomb": b"\0" * (64 << 20)})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + offset, 100)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="cannot be read as an archive .*CRC"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_zip_that_declares_more_than_it_holds_is_refused(tmp_path):
    path = write_zip(tmp_path / "t.zip", {"short": b"text"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + offset, 100)
    path.write_bytes(data)
    with pytest.raises(UserError, match="'short' ends early"):
        read(path)


def test_a_sparse_tar_member_is_refused(tmp_path):
    member = tarfile.TarInfo("holes")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % (1 << 29)  # its size with the holes
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "t.tar").write_bytes(header + b"\0" * 1024)
    with pytest.raises(UserError, match="'holes' is a link, a device or sparse"):
        read(tmp_path / "t.tar")


@pytest.mark.parametrize("name", [*MODES, "t.zip"])
def test_an_archive_cut_anywhere_is_refused(tmp_path, name):
    rng = random.Random(0)
    files = {f"file{i}": rng.randbytes(700) for i in range(6)}
    path = (
        write_tar(tmp_path / name, files, MODES[name]) if name in MODES else write_zip(tmp_path / name, files)
    )
    whole = path.read_bytes()
    end = len(whole) if name != "t.tar" else 6 * (512 + 1024)  # what follows is the mark of the end
    for cut in sorted({*range(0, end, 97), *range(0, end, 512), end - 1}):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.xz", "t.zip"])
def test_damage_anywhere_gives_a_message_or_changes_no_content_unnoticed(tmp_path, name):
    rng = random.Random(1)
    files = {f"file{i}": rng.randbytes(100) for i in range(3)}
    path = (
        write_tar(tmp_path / name, files, MODES[name]) if name in MODES else write_zip(tmp_path / name, files)
    )
    whole = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 20))):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            found = read(path)
        except UserError:
            continue
        if name != "t.tar":  # which has no checksum of contents
            assert {content for _, content in found} <= set(files.values())


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"a": b"1", "b": b"2", "c": b"3"})
    data = bytearray(path.read_bytes())
    data[1024] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged or cut off: bad checksum"):
        read(path)


def test_a_wrong_checksum_at_the_end_of_a_compressed_tar_is_seen(tmp_path):
    path = write_tar(tmp_path / "t.tar.gz", mode="w:gz")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as an archive .*CRC"):
        read(path)


def test_a_link_out_of_a_folder_is_refused_where_it_is_wanted(tmp_path):
    (tmp_path / "secret").write_text("x")
    root = write_folder(tmp_path / "root")
    (root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="'link' is a link out of the folder"):
        read(root)
    assert read(root, lambda name: name != "link") == sorted(FILES.items())


def test_a_link_to_a_folder_outside_is_refused(tmp_path):
    write_folder(tmp_path / "elsewhere")
    root = write_folder(tmp_path / "root")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="'link' is a link to a folder outside"):
        read(root, lambda name: name == "z.txt")


def test_links_within_a_folder_are_read_and_loops_are_not_followed(tmp_path):
    root = write_folder(tmp_path / "root", {"a/one": b"1"})
    (root / "a" / "loop").symlink_to(root)
    (root / "same").symlink_to(root / "a" / "one")
    assert read(root) == [("a/one", b"1"), ("same", b"1")]
    (tmp_path / "to-root").symlink_to(root)
    assert read(tmp_path / "to-root") == [("a/one", b"1"), ("same", b"1")]


def test_a_broken_link_and_a_pipe_in_a_folder_are_refused(tmp_path):
    for name, make in (("gone", lambda p: p.symlink_to("nothing")), ("pipe", os.mkfifo)):
        root = tmp_path / f"root-{name}"
        root.mkdir()
        make(root / name)
        with pytest.raises(UserError, match=f"'{name}' is a device, pipe, socket or a link to nothing"):
            read(root)


@pytest.mark.parametrize("write", [write_tar, write_zip, write_folder])
def test_one_member_at_a_time_is_held(tmp_path, write):
    path = write(tmp_path / "source", {f"{i:02}": bytes([i]) * (1 << 20) for i in range(40)})
    seen = members(path, everything)
    next(seen)
    tracemalloc.start()
    try:
        assert sum(len(content) for _, content in seen) == 39 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_headers_of_passed_members_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_PIECE", 1 << 15)
    path = write_tar(tmp_path / "t.tar", {f"directory/file{i}": b"" for i in range(5000)})
    tracemalloc.start()
    try:
        assert not read(path, lambda name: False)
        assert tracemalloc.get_traced_memory()[1] < 400_000  # 5,000 headers have a million bytes
    finally:
        tracemalloc.stop()


def test_nothing_is_written_beside_the_archive(tmp_path):
    path = write_tar(tmp_path / "t.tar.gz", mode="w:gz")
    read(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.tar.gz"]
