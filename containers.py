"""Finds where the sound of an audio file lies: in parts, each of which libsndfile decodes whole.

libsndfile believes headers. A recorder that crashed, a pipe and `cat a.mp3 b.mp3` leave headers
that promise less or more than there is, or none at all. So `parts` finds the parts of a file by
walking over it, and puts a right header in the place of a wrong one. Nothing is decoded here.
Throughout, `file` is a seekable binary file, and `start` and `stop` are places in it, in bytes.
"""

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple


class Part(NamedTuple):
    """Says what to decode as one file, and how to know whether all of it was there."""

    pieces: list[bytes | tuple[int, int]]  # in order; (start, stop) are places in the file
    frames: int = 0  # samples that must be there; 0: as many as the decoder says
    share: float = 1.0  # the share that is there of the bytes that the header promises
    flaw: str = ""  # why the part is not whole, where nothing says how much is lost


# How files begin that ffmpeg reads and libsndfile does not: mp4, webm, wma, aac, amr.
FOREIGN = re.compile(rb".{4}ftyp|\x1aE\xdf\xa3|0&\xb2u|\xff[\xf0\xf1\xf8\xf9]|#!AMR", re.DOTALL)
ADVICE = "Convert it: ffmpeg -i IN OUT.wav"


def parts(file: BinaryIO) -> list[Part]:
    """Returns the parts of a file, and of the files that were appended to it.

    A file of a format without a walk (WALKS) is one part, as it is. Raises ValueError for a file of
    a FOREIGN format, and for one that begins as mp3 but has no frames.
    """
    place = 0
    stop = file.seek(0, 2)
    whole = Part([(0, stop)])
    found = []
    while size := tag_size(at(file, place, 32)):
        place += size
    while size := tag_before(file, stop):
        stop -= size
    head = at(file, place, 8)
    if FOREIGN.match(head):
        raise ValueError(f"Format not recognised. {ADVICE}")
    if head[:4] not in WALKS and (place or frame_of(head)):
        found = list(mpeg_parts(file, place, stop))
        if not found:  # the decoder would take anything for mp3 that begins so, and print notes
            raise ValueError(f"no mp3 frames follow its beginning. {ADVICE}")
        place = stop
    while walk := WALKS.get(at(file, place, 4)) if place < stop else None:
        more, place = walk(file, place, stop)
        found += more
    return found or [whole]


def at(file: BinaryIO, place: int, size: int) -> bytes:
    """Returns the `size` bytes at a place, fewer at the end of the file."""
    file.seek(place)
    return file.read(size)


def matches(file: BinaryIO, pattern: bytes, start: int, stop: int) -> Iterator[int]:
    """Yields the places where a pattern of at most 16 bytes begins, in order."""
    block = 2**16
    for first in range(start, stop, block):
        content = at(file, first, min(block + 15, stop - first))
        for found in re.finditer(pattern, content, re.DOTALL):
            if found.start() < block:
                yield first + found.start()


# ---- Tags, which may stand before and after a file of any format


def tag_size(head: bytes) -> int:
    """Returns the size of the tag (ID3v2, ID3v1, APE) that begins with these 32 bytes, or 0."""
    if head[:3] == b"ID3" and len(head) >= 10:
        size = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
        return 10 + size + (10 if head[5] & 16 else 0)
    if head[:8] == b"APETAGEX" and len(head) == 32:
        is_header = head[23] & 32  # else it is a footer, which is a tag's last 32 bytes
        return 32 + (int.from_bytes(head[12:16], "little") if is_header else 0)
    return 128 if head[:3] == b"TAG" else 0


def tag_before(file: BinaryIO, stop: int) -> int:
    """Returns the size of the tag (ID3v1 or APE) that ends at `stop`, or 0."""
    if stop >= 128 and at(file, stop - 128, 3) == b"TAG":
        return 128
    foot = at(file, stop - 32, 32) if stop >= 32 else b""
    if foot[:8] != b"APETAGEX":
        return 0
    size = int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 128 else 0)
    return size if 32 <= size <= stop else 0


# ---- Wav and other formats of chunks: a name, a size, as many bytes. One chunk has the samples.


class Chunks(NamedTuple):
    """Says how a format writes its chunks."""

    first: int  # where the first chunk begins
    name: int  # bytes of a chunk's name
    size: int  # bytes of a chunk's size
    order: str  # byte order of the size
    align: int  # every chunk begins at a multiple of this number
    data: bytes = b"data"  # how the name of the chunk with the samples begins
    ahead: int = 0  # bytes before the samples in that chunk


CHUNKS = {
    b"RIFF": Chunks(12, 4, 4, "little", 2),
    b"RF64": Chunks(12, 4, 4, "little", 2),
    b"RIFX": Chunks(12, 4, 4, "big", 2),
    b"FORM": Chunks(12, 4, 4, "big", 2, b"SSND", 8),
    b"caff": Chunks(8, 4, 8, "big", 1, ahead=4),
    b"riff": Chunks(40, 16, 8, "little", 8),
}
# A chunk's name has four letters or signs.
NAME = re.compile(rb"[ -~]{4}")
# {bytes of a size field: the least size that means "unknown", as a writer on a pipe says}.
UNKNOWN = {4: 0x7F000000, 8: 2**62}
# Chunks with these names may follow the samples.
METADATA = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"cue ")
METADATA += (b"fact", b"PEAK", b"smpl", b"JUNK", b"_PMX", b"cart")
# How the next of several files begins.
HEAD = (
    rb"R(?:IFF|IFX|F64).{4}WAVE|FORM.{4}AIF[FC]|caff\x00\x01\x00\x00|riff\x2e\x91\xcf\x11|"
    rb"\.snd\x00\x00"
)
# The format codes of wav files that hold mp2 or mp3.
MPEG_IN_WAV = (0x50, 0x55)
# The most bytes of a header on a pipe; a recorder may put a picture there.
LONGEST_HEADER = 2**22
# The most chunks behind the samples. Without a limit the time would grow with the square of the
# number of heads in a file: from each head a walk would go to the end.
MOST_CHUNKS = 64


def chunk_parts(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int]:
    """Returns (the parts of a file of chunks that begins at `start`, where the next file begins).

    The size of the samples may be more than there is, because the file was cut short, or less,
    because its writer had no time to write the size.
    """
    kind = CHUNKS[at(file, start, 4)]
    place = start + kind.first
    field = None  # the place of the number that says how many bytes the samples have
    width = kind.size
    code = 0
    while True:
        if place + kind.name + kind.size > stop:
            return [Part([(start, stop)])], stop  # no samples, as the decoder will say
        head = at(file, place, kind.name + kind.size)
        body = place + len(head)
        size = chunk_size(kind, head)
        if head[:4] == kind.data:
            break
        if head[:4] == b"ds64":  # RF64 has the size of the samples there, in 8 bytes
            field = body + 8
            width = 8
        if head[:4] == b"fmt " and kind.order == "little":
            code = int.from_bytes(at(file, body, 2), "little")
        place = body + size + -size % kind.align
    if field is None:
        field = place + kind.name
    else:
        size = int.from_bytes(at(file, field, 8), "little")
    # An odd number of bytes may be padded or not.
    ends = [end_of_chunks(file, kind, body + size + gap, stop) for gap in {-size % kind.align, 0}]
    end = min(filter(None, ends), default=0)
    if code in MPEG_IN_WAV:
        return list(mpeg_parts(file, body, body + size if end else stop)), end or stop
    if end:
        return [Part([(start, end)])], end
    stop = next(matches(file, HEAD, body, stop), stop)
    there = stop - body
    right = min(there + (24 if kind.name == 16 else 0), 256**width - 1).to_bytes(width, kind.order)
    pieces = [(start, field), right, (field + width, stop)]
    return [Part(pieces, share=share_of(there, size, width))], stop


def share_of(there: int, size: int, width: int) -> float:
    """Returns what share `there` bytes are of the `size` that a field of `width` bytes promises.

    The share is 1 where the field promises less, or says that the size is not known.
    """
    return there / size if 0 < there < size < UNKNOWN[width] else 1.0


def chunk_size(kind: Chunks, head: bytes) -> int:
    """Returns the bytes of a chunk, without its head of name and size."""
    size = int.from_bytes(head[kind.name :], kind.order)
    return max(size - 24, 0) if kind.name == 16 else size  # W64 counts the head, too


def end_of_chunks(file: BinaryIO, kind: Chunks, place: int, stop: int) -> int:
    """Returns where the chunks from `place` on end: at `stop`, or where the next file begins.

    It returns 0 where there are no chunks, or more than MOST_CHUNKS.
    """
    for _ in range(MOST_CHUNKS):
        if stop - place < 4:
            return stop if place - stop < kind.align else 0  # the last padding may be missing
        head = at(file, place, kind.name + kind.size)
        if head[:4] in WALKS:
            return place
        if len(head) < kind.name + kind.size or not NAME.fullmatch(head[:4]):
            return 0
        size = chunk_size(kind, head)
        place += len(head) + size + -size % kind.align
        if head[:4] in METADATA and place > stop:
            return stop  # only this chunk is cut short
    return 0


def header(read: Callable[[int], bytes]) -> tuple[bytes, int]:
    """Returns (the header of a pipe as a file without samples, the bytes of samples it promises).

    read(n) gives the next n bytes, fewer at the end. The header is b"" in a format that no pipe may
    have.
    """
    head = read(8)
    if head[:4] in (b".snd", b"dns."):
        order = "big" if head[:4] == b".snd" else "little"
        promised = int.from_bytes(read(4), order)
        body = int.from_bytes(head[4:], order)
        return head + bytes(4) + read(min(max(body, 24) - 12, LONGEST_HEADER)), promised
    if not (kind := CHUNKS.get(head[:4])):
        return b"", 0
    wide = 0
    head = bytearray(head.replace(b"RF64", b"RIFF") + read(kind.first - 8))
    for _ in range(1000):  # no recorder writes as many chunks
        chunk = read(kind.name + kind.size)
        size = chunk_size(kind, chunk)
        if chunk[:4] == kind.data:
            none = kind.ahead + (24 if kind.name == 16 else 0)
            ahead = read(kind.ahead)
            size = wide if wide and size == 2**32 - 1 else max(size - kind.ahead, 0)
            if kind.data == b"SSND":  # its first number says how many bytes precede the samples
                skipped = read(min(int.from_bytes(ahead[:4], "big"), LONGEST_HEADER))
                size = max(size - len(skipped), 0)
            none = none.to_bytes(kind.size, kind.order)
            return bytes(head) + chunk[: kind.name] + none + bytes(kind.ahead), size
        if not chunk or max(size, len(head)) > LONGEST_HEADER:
            break
        body = read(size + -size % kind.align)
        if chunk[:4] == b"ds64":  # RF64 has the size of the samples there, in 8 bytes
            wide = int.from_bytes(body[8:16], "little")
        else:
            head += chunk + body
    return b"", 0


def name_behind(magic: bytes, size: int, content: bytes) -> bytes:
    """Returns the name of the chunk or file that follows samples on a pipe, or b"": more samples.

    content: what comes after `size` bytes of samples behind a header that begins with `magic`. The
    last bytes count as a name, too, where they are too few for one.
    """
    if magic not in WALKS:
        return b""
    kind = CHUNKS.get(magic, Chunks(24, 4, 4, "big", 1))  # au has no chunks, but files may follow
    padding = -size % max(kind.align, 2)  # libsndfile pads caf as well
    for gap in (padding, 0):  # an odd number of bytes may be padded or not
        head = content[gap:][: kind.name + kind.size]
        known = head[:4] in METADATA or head[:4] in WALKS
        is_chunk = len(head) == kind.name + kind.size and NAME.fullmatch(head[:4])
        if known or is_chunk and head[:4] != kind.data and chunk_size(kind, head) < LONGEST_HEADER:
            return head[:4]
    return content if size and len(content) < padding + 4 else b""


def au_parts(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int]:
    """Returns (the part of an au file that begins at `start`, where the next file begins)."""
    head = at(file, start, 12)
    order = "big" if head[:4] == b".snd" else "little"
    size = int.from_bytes(head[8:12], order)
    body = start + max(int.from_bytes(head[4:8], order), 24)  # the header has so many bytes
    if body + size < stop and at(file, body + size, 4) in WALKS:
        return [Part([(start, body + size)])], body + size
    stop = next(matches(file, HEAD, body, stop), stop)
    pieces = [head[:8] + b"\xff" * 4, (start + 12, stop)]
    return [Part(pieces, share=share_of(stop - body, size, 4))], stop


def nist_parts(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int]:
    """Returns (the part of a NIST SPHERE file that begins at `start`, where it ends)."""
    count = re.search(rb"\nsample_count -i (\d{1,15})", at(file, start, 4096))
    return [Part([(start, stop)], int(count[1]) if count else 0)], stop


# ---- FLAC and Ogg


def flac_parts(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int]:
    """Returns (the part of a FLAC file that begins at `start`, where the next file begins).

    A header says 0 samples where their number is not known. The part gets such a header, so that
    all samples are decoded.
    """
    end = next(matches(file, rb"fLaC[\0\x80]\0\0\x22", start + 4, stop), stop)
    head = at(file, start, 26).ljust(26, b"\0")
    sound_end = end
    while size := tag_before(file, sound_end):
        sound_end -= size
    frames = int.from_bytes(head[21:26], "big") % 2**36
    head = head[:21] + bytes([head[21] & 0xF0, 0, 0, 0, 0])
    return [Part([head, (start + 26, sound_end)], frames)], end


def ogg_parts(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int]:
    """Returns (the part of an Ogg stream that begins at `start`, where the next file begins).

    The first pages of a stream may each open one of several streams that are mixed. A page that
    opens a stream later begins the next file.
    """
    place = end = start
    opening = True
    while place < stop:
        page = at(file, place, 27)
        if len(page) < 27:
            return [Part([(start, stop)])], stop
        if page[5] & 2 and not opening:
            break
        opening = page[5] & 2
        end = after = place + 27 + page[26] + sum(at(file, place + 27, page[26]))
        if at(file, after, 4) not in (b"OggS", b""):  # this page was cut short, or no page follows
            after = next(matches(file, b"OggS", place + 4, stop), stop)
            is_last = page[5] & 4 and end <= after  # what follows a stream's last page is no sound
            end = end if is_last else after
        place = after
    return [Part([(start, min(end, stop))])], min(place, stop)


# ---- Mp3


# {(True for MPEG 1, False for 2 and 2.5; layer): bit rates in kbit/s}.
BITRATES = {
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class SoundFrame(NamedTuple):
    """Holds what the header of an MPEG audio frame says. A decoder wants one `kind` throughout."""

    kind: tuple  # (layer, rate, True for mono, the bit rate where layer 1 or 2 has no Xing header)
    size: int  # in bytes; 0 in free format, where it ends at the next frame
    samples: int
    info: int  # where the Xing or Info header begins, if the frame has one


def frame_of(head: bytes) -> SoundFrame | None:
    """Returns the frame whose header is the first 4 bytes of `head`, or None: it is no header."""
    if len(head) < 4 or head[0] != 255 or head[1] < 224:
        return None
    version = head[1] >> 3 & 3
    layer = 4 - (head[1] >> 1 & 3)
    bitrate = head[2] >> 4
    rate = head[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate == 15 or rate == 3:
        return None
    first = version == 3
    mono = head[3] >> 6 == 3
    padding = head[2] >> 1 & 1
    rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]  # MPEG 1, 2, 2.5
    bitrate = bitrate and 1000 * BITRATES[first, layer][bitrate - 1]
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    size = samples // 8 * bitrate // rate + padding
    if layer == 1:
        size = 4 * (12 * bitrate // rate + padding)
    info = 4 + (17 if first == mono else 9 if mono else 32)
    return SoundFrame((layer, rate, mono, bitrate * (layer < 3)), bitrate and size, samples, info)


def sound_frame(file: BinaryIO, place: int, stop: int) -> SoundFrame | None:
    """Returns the frame at `place`, or None.

    A frame of the same kind, a tag or the end must follow: four bytes of anything may look like the
    header of a frame. In free format any frame without a next one would reach to the end.
    """
    head = at(file, place, 4)
    said = frame_of(head)
    frame = sized(file, place, stop, said, head)
    if frame is None or said.size and place + frame.size == stop:
        return frame
    after = at(file, place + frame.size, 32)
    other = frame_of(after)
    return frame if tag_size(after) or other and other.kind == frame.kind else None


def sized(
    file: BinaryIO, place: int, stop: int, frame: SoundFrame | None, head: bytes
) -> SoundFrame | None:
    """Returns the frame with its size.

    In free format the header does not tell the size, and the frame ends where the next begins.
    """
    if frame is None or frame.size:
        return frame
    like = re.escape(head[:2]) + b"[" + re.escape(bytes((head[2] & 0xFD, head[2] | 2))) + b"]"
    after = next(matches(file, like, place + 4, min(place + 8192, stop)), stop)
    return frame._replace(size=after - place)


# Samples that a decoder of layer 3 leaves out at the start where it knows the length.
DECODER_DELAY = 529
XING = (b"Xing", b"Info", b"VBRI")


class Run:
    """Collects frames to decode together. State: where they lie, what their Xing header says."""

    def __init__(self, head: bytes, frame: SoundFrame):
        self.head = head[:4]
        self.frame = frame
        self.extents: list[tuple[int, int]] = []  # (start, stop) of frames without a gap
        self.count = 0  # of the frames
        self.junk = 0  # bytes between the frames
        self.promised = 0  # frames, by the Xing header
        self.trim: tuple[int, int] | None = None  # samples added before and after, by that header
        self.flaw = ""

    def add(self, place: int, size: int) -> None:
        """Adds a frame of `size` bytes."""
        first = self.extents.pop()[0] if self.extents and self.extents[-1][1] == place else place
        self.extents.append((first, place + size))
        self.count += 1

    def part(self) -> Part:
        """Returns the frames behind a right Xing header.

        From this header the decoder knows the length, and what to leave out at either end.
        """
        lost = self.promised - self.count
        if not self.promised:  # bytes between the frames may have been frames
            size = sum(stop - start for start, stop in self.extents)
            lost = self.junk * self.count // max(size, 1)
        frames = (self.count + max(lost, 0)) * self.frame.samples
        header = []
        if self.frame.kind[0] == 3:
            delay, padding = self.trim or (0, 0)
            padding *= lost >= 0  # where more frames follow, the padded end is somewhere in them
            frames -= delay + max(padding, DECODER_DELAY)
            trim = self.trim and (delay, padding * (lost <= 0))
            header = [xing_header(self.head, self.count, trim)]
        return Part([*header, *self.extents], frames, flaw=self.flaw)


def xing_header(head: bytes, frames: int, trim: tuple[int, int] | None) -> bytes:
    """Makes a frame without sound that says how many frames follow.

    trim: how many samples the decoder shall leave out of them, (before, after).
    """
    # The highest bit rate makes the frame long enough.
    head = bytes((255, head[1] | 1, head[2] & 0x0C | 0xE0, head[3]))
    frame = frame_of(head)
    lame = b"LAME" + bytes(17) + (trim[0] << 12 | trim[1]).to_bytes(3, "big") if trim else b""
    content = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big") + lame
    return (head.ljust(frame.info, b"\0") + content).ljust(frame.size, b"\0")


def reads_xing(run: Run, frame: bytes) -> bool:
    """Returns whether a frame holds no sound but a Xing, Info or VBRI header, noted in `run`."""
    xing = frame[run.frame.info :]
    vbri = frame[36:]
    if vbri[:4] == b"VBRI":
        run.promised = int.from_bytes(vbri[14:18], "big")
        return True
    if xing[:4] not in (b"Xing", b"Info"):
        return False
    flags = int.from_bytes(xing[4:8], "big")
    run.promised = int.from_bytes(xing[8:12], "big") if flags & 1 else 0
    lame = xing[8 + sum(size for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)) if flags & bit) :]
    if len(lame) >= 24 and lame[0]:
        trim = int.from_bytes(lame[21:24], "big")
        run.trim = trim >> 12, trim & 4095
    return True


def mpeg_parts(file: BinaryIO, start: int, stop: int) -> Iterator[Part]:
    """Yields the parts of MPEG audio: all frames, in runs.

    A run begins with each Xing header, and where the kind of the frames changes.
    """
    place = start
    last = start  # where the last frame begins
    run = None
    while place < stop:
        head = at(file, place, 64)
        frame = sized(file, place, stop, frame_of(head), head)
        if frame and not (run and run.frame.kind == frame.kind):
            frame = sound_frame(file, place, stop)
        ends_early = frame and place + frame.size > stop
        if ends_early or not frame and run and len(head) < 4 and run.head.startswith(head[:2]):
            run.flaw = "it ends within a frame"
            place = stop
        elif not frame and (size := tag_size(head[:32])):
            place += size
            last = place - 4
        elif not frame:  # the last frame may have been cut short, and the next begin in it
            likely = matches(file, rb"\xff(?=[\xe0-\xff][\0-\xef])", last + 4, stop)
            after = next((p for p in likely if sound_frame(file, p, stop)), stop)
            if run:
                run.junk += max(after - place, 0)
                run.flaw = run.flaw or ("one of its frames is cut short" if after < place else "")
            place = after
        else:
            new = Run(head, frame)
            is_header = frame.kind[0] == 3 and any(sign in head for sign in XING)
            is_header = is_header and reads_xing(new, at(file, place, 192))
            if run is None or is_header or frame.kind != run.frame.kind:
                if run and run.extents:
                    yield run.part()
                run = new
            if not is_header:
                run.add(place, frame.size)
            last = place
            place += frame.size
    if run and (run.extents or run.promised):
        yield run.part()


WALKS = dict.fromkeys(CHUNKS, chunk_parts) | {
    b"fLaC": flac_parts,
    b"OggS": ogg_parts,
    b".snd": au_parts,
    b"dns.": au_parts,
    b"NIST": nist_parts,
}
