"""Members of a folder or archive are read one after another; nothing is unpacked to the disk.

An archive is a tar, in any compression, or a zip, told by its content and not by its name. Reading it keeps
within limits, whatever the archive says of itself.
"""

import bz2
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lra.errors import UserError

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the first member; the end of a zip without members
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_LONGEST_HEADER = 1 << 20
"""Bytes that one member may spend on its name and other extras, which tarfile reads in one go."""
_PIECE = 1 << 20
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    IndexError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
"""What the standard library raises for damaged archives; much of it is undocumented and without a common
base.
"""


def is_archive(path: Path) -> bool:
    """Whether a file is a tar, compressed or not, or a zip, by its first bytes."""
    if not path.is_file():
        return False
    if _start(path).startswith(_ZIP):
        return True
    try:
        with _unpacked(path) as stream:
            tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except _BROKEN:
        return False
    return True


def members(
    path: Path, wanted: Callable[[str], bool], *, max_member: int = 1 << 30, max_total: int = 64 << 30
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each regular file with wanted(name), of a folder (sorted) or archive (as stored).

    Names are posix, as stored, without a leading './'. One content at a time is held. In a tar, unwanted
    members count for `max_total` too, because a stream has to be unpacked to be passed over. Links to
    folders inside a folder are not followed: their files come under their own names.

    UserError: a wanted member that is a link, device or encrypted, a link that leads out of a folder, a name
    that is absolute or has '..', more bytes than the limits (declared or found), a damaged or truncated
    archive.
    """
    parts: list[bytes] = []
    for name, piece in pieces(path, wanted, max_member=max_member, max_total=max_total):
        if piece:
            parts.append(piece)
            continue
        content = b"".join(parts)
        parts.clear()
        yield name, content


def pieces(
    path: Path, wanted: Callable[[str], bool], *, max_member: int = 1 << 30, max_total: int = 64 << 30
) -> Iterator[tuple[str, bytes]]:
    """(name, piece) as `members`, for files too large to hold: each piece is at most 1 MiB, and an empty one
    ends its member.
    """
    limits = _Limits(path, max_member, max_total)
    try:
        if path.is_dir():
            yield from _folder(path.resolve(), wanted, limits)
        elif not path.exists():
            raise UserError(f"{path}: there is no such file or folder; correct the name")
        elif not is_archive(path):
            raise UserError(
                f"{path} cannot be read: it is neither a folder nor a tar or zip archive; get it anew, or "
                "name another place"
            )
        else:
            read = _zip if _start(path).startswith(_ZIP) else _tar
            yield from read(path, wanted, limits)
    except UserError:
        raise
    except _BROKEN as error:
        what = "" if path.is_dir() else " as an archive"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read{what} ({reason}); get it anew") from error


class _Limits:
    """Refuses what would be too much before it is read."""

    def __init__(self, path: Path, max_member: int, max_total: int) -> None:
        self.path, self.max_member, self.max_total, self.total = path, max_member, max_total, 0

    def hold(self, name: str, size: int) -> None:
        """A member of this many bytes is about to be read into memory."""
        if size > self.max_member:
            raise UserError(
                f"{self.path}: {name!r} has {size:,} bytes, more than the {self.max_member:,} that a member "
                "may have; check that this is the right archive"
            )

    def unpack(self, size: int) -> None:
        """This many more bytes are about to be unpacked, held or not."""
        self.total += size
        if self.total > self.max_total:
            raise UserError(
                f"{self.path} unpacks to more than the {self.max_total:,} bytes that it may have; "
                "check that this is the right archive"
            )


def _plain(path: Path, name: str) -> str:
    """The name without leading './'; UserError where it points outside."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(
            f"{path}: the name {name!r} leads out of the archive, which no known archive of this data does; "
            "get it anew"
        )
    while name.startswith("./"):
        name = name[2:]
    return name


def _refuse(path: Path, name: str, what: str) -> UserError:
    return UserError(f"{path}: {name!r} is {what}; only regular files are read. Put the file itself there")


def _folder(root: Path, wanted: Callable[[str], bool], limits: _Limits) -> Iterator[tuple[str, bytes]]:
    for name in sorted(_files(root, root)):
        if not wanted(name):
            continue
        place = root / name
        if place.is_symlink() and not place.resolve().is_relative_to(root):
            raise _refuse(root, name, f"a link out of the folder, to {place.resolve()}")
        if not place.is_file():  # before opening: a named pipe would wait for ever
            raise _refuse(root, name, "a device, pipe, socket or a link to nothing")
        size = place.stat().st_size
        limits.hold(name, size)
        limits.unpack(size)
        with open(place, "rb") as file:
            yield from _pieces(name, file, size, OSError(f"{name!r} changed while it was read"))


def _files(root: Path, folder: Path) -> Iterator[str]:
    """Names of everything below a folder that is not a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = Path(entry.path).relative_to(root).as_posix()
            if entry.is_dir(follow_symlinks=False):
                yield from _files(root, Path(entry.path))
            elif not entry.is_symlink() or not entry.is_dir():
                yield name
            elif not Path(entry.path).resolve().is_relative_to(root):
                raise UserError(
                    f"{root}: {name!r} is a link to a folder outside, {Path(entry.path).resolve()}; "
                    "put the folder itself there, or name the folder that has everything"
                )


def _zip(path: Path, wanted: Callable[[str], bool], limits: _Limits) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _plain(path, member.filename)
            if member.is_dir() or not wanted(name):
                continue
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                raise _refuse(path, name, "a link or device")
            if member.flag_bits & 1:
                raise _refuse(path, name, "encrypted")
            # The other methods cannot be made to unpack a little at a time.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _refuse(path, name, f"compressed by method {member.compress_type}, not deflate")
            limits.hold(name, member.file_size)
            limits.unpack(member.file_size)
            with archive.open(member) as file:  # which stops at the declared size and checks the CRC
                early = zipfile.BadZipFile(f"{name!r} ends early")
                yield from _pieces(name, file, member.file_size, early)


def _tar(path: Path, wanted: Callable[[str], bool], limits: _Limits) -> Iterator[tuple[str, bytes]]:
    with _unpacked(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, bufsize=_PIECE) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep every header of the archive
                limits.unpack(archive.offset - limits.total)  # where the next header is
                name = _plain(path, member.name)
                if member.isdir() or not wanted(name):
                    continue
                if not member.isreg() or member.issparse():
                    raise _refuse(path, name, "a link, a device or sparse")
                limits.hold(name, member.size)
                early = tarfile.ReadError(f"{name!r} ends early")
                yield from _pieces(name, archive.extractfile(member), member.size, early)
        while padding := stream.read(_PIECE):  # to the end, where a compressed stream has its checksum
            limits.unpack(len(padding))


def _pieces(name: str, file: IO[bytes], size: int, wrong: Exception) -> Iterator[tuple[str, bytes]]:
    """The pieces of one member and the empty one; `wrong` is raised if it has another size."""
    left = size
    while piece := file.read(_PIECE):
        left -= len(piece)
        if left < 0:
            raise wrong
        yield name, piece
    if left:
        raise wrong
    yield name, b""


class _Header(tarfile.TarInfo):
    """A header that must be whole. tarfile itself takes a damaged or missing one for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end of the archive is a block of zeros
            raise tarfile.ReadError(f"it is damaged or cut off: {error}") from None
        if header.size < 0 or (header.type in _EXTRAS and header.size > _LONGEST_HEADER):
            raise tarfile.ReadError(f"a header of type {header.type!r} with {header.size:,} bytes")
        return header


_EXTRAS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(6)


def _unpacked(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed if they are compressed."""
    start = _start(path)
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)(path, "rb")
