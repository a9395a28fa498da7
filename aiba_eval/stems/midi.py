"""MIDI pieces as notes and controls: read, cut, split into parts, written."""

from __future__ import annotations

import bisect
import io
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mido
import numpy as np

from aiba_eval.datasets import slakh

from .errors import MalformedMidi

DRUM_CHANNEL = 9
DRUM_PROGRAM = 128  # Slakh's number for a drum kit
LONGEST = 3600.0  # seconds; a damaged file may claim days
TAIL = 2.0  # seconds in which the last notes die away
DEFAULT_TEMPO = 500_000  # microseconds per beat where the file says nothing

META = ("set_tempo", "time_signature", "key_signature")
# registered parameters are sent as a sequence (select, then enter data) and a bank waits for its program change:
# the last value of each controller alone would not restore them
SEQUENCED_CONTROLS = {0, 6, 32, 38, 96, 97, 98, 99, 100, 101}

_BROKEN_KEY = re.compile(rb"\xff\x59\x02..", re.DOTALL)


class Note(NamedTuple):
    """One note; `start` and `end` in ticks, `program` 128 for a drum kit."""

    start: int
    end: int
    pitch: int
    velocity: int
    channel: int
    program: int


class Event(NamedTuple):
    """A message that is no note; `tick` is absolute."""

    tick: int
    message: mido.Message


class Part(NamedTuple):
    """What becomes one stem: the notes of one program on one channel."""

    channel: int
    program: int

    @property
    def is_drum(self) -> bool:
        return self.program == DRUM_PROGRAM

    @property
    def inst_class(self) -> str:
        return slakh.inst_class(self.program, self.is_drum)

    @property
    def instrument(self) -> str:
        return slakh.instrument(self.inst_class, self.program, self.is_drum)


@dataclass(frozen=True)
class Score:
    """A piece: notes, controls, and the tempo map that turns ticks into seconds."""

    ticks_per_beat: int
    notes: tuple[Note, ...]
    events: tuple[Event, ...]
    end: int = 0  # ticks; at least the last note's end
    _tempo: tuple[tuple[int, float, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tempo = [(0, 0.0, DEFAULT_TEMPO)]  # from this tick, at this second, microseconds per beat
        for tick, message in self.events:
            if message.type == "set_tempo":
                since, second, micros = tempo[-1]
                second += (tick - since) * micros * 1e-6 / self.ticks_per_beat
                tempo.append((tick, second, message.tempo))
        object.__setattr__(self, "_tempo", tuple(tempo))

    def seconds(self, tick: int) -> float:
        """When a tick is, in seconds."""
        since, second, micros = self._tempo[bisect.bisect_right(self._tempo, tick, key=lambda entry: entry[0]) - 1]
        return second + (tick - since) * micros * 1e-6 / self.ticks_per_beat

    def tick(self, seconds: float) -> int:
        """The last tick that is not after `seconds`."""
        since, second, micros = self._tempo[bisect.bisect_right(self._tempo, seconds, key=lambda entry: entry[1]) - 1]
        # a nanosecond of slack, lest a tick's own time is rounded to the tick before it
        return since + int((seconds - second + 1e-9) * self.ticks_per_beat / (max(micros, 1) * 1e-6))

    @property
    def length(self) -> float:
        """Seconds until the last note ends."""
        return self.seconds(self.end)

    def parts(self) -> dict[Part, int]:
        """Every part and how many notes it has, sorted by channel and program."""
        counts: dict[Part, int] = defaultdict(int)
        for note in self.notes:
            counts[_part(note)] += 1
        return dict(sorted(counts.items()))


def read(data: bytes) -> Score:
    """Read a standard MIDI file of type 0 or 1.

    A note that never ends lasts to the end of the piece. A key signature that means nothing, as two of Simutrans'
    pieces have, is read as C major: nothing here depends on it.

    Raises
    ------
    MalformedMidi
        If it cannot be read, holds no notes or lasts longer than `LONGEST`.
    """
    try:
        try:
            file = mido.MidiFile(file=io.BytesIO(data), clip=True, charset="latin-1")
        except mido.midifiles.KeySignatureError:
            file = mido.MidiFile(
                file=io.BytesIO(_BROKEN_KEY.sub(b"\xff\x59\x02\0\0", data)), clip=True, charset="latin-1"
            )
    except (
        Exception
    ) as error:  # mido raises what its parser happens to meet: EOFError, IndexError, ValueError, OSError …
        raise MalformedMidi(f"not a readable MIDI file: {error!r}") from error
    if file.type not in (0, 1) or file.ticks_per_beat <= 0:
        raise MalformedMidi(f"a MIDI file of type {file.type} with division {file.ticks_per_beat} is not supported")

    notes: list[Note] = []
    events: list[Event] = []
    program = [0] * 16
    sounding: dict[tuple[int, int], list[Note]] = defaultdict(list)
    for tick, message in _merged(file.tracks):
        if message.type == "note_on" and message.velocity > 0:
            channel = message.channel
            played = DRUM_PROGRAM if channel == DRUM_CHANNEL else program[channel]
            sounding[channel, message.note].append(Note(tick, -1, message.note, message.velocity, channel, played))
        elif message.type in ("note_on", "note_off"):
            begun = sounding[message.channel, message.note]
            if begun:
                note = begun.pop(0)
                notes.append(note._replace(end=max(tick, note.start + 1)))
        elif message.is_meta:
            if message.type in META:
                events.append(Event(tick, message))
        elif message.type == "sysex" or hasattr(message, "channel"):
            if message.type == "program_change":
                program[message.channel] = message.program
            events.append(Event(tick, message))
    endless = [note for begun in sounding.values() for note in begun]
    end = max([note.end for note in notes] + [note.start + 1 for note in endless], default=0)
    notes += [note._replace(end=end) for note in endless]
    if not notes:
        raise MalformedMidi("the MIDI file holds no notes")
    score = Score(file.ticks_per_beat, tuple(sorted(notes)), tuple(events), end)
    if score.length > LONGEST:
        raise MalformedMidi(f"it lasts {score.length:.0f} s, over the limit of {LONGEST:.0f}")
    return score


def only(score: Score, instruments: Collection[str]) -> Score:
    """A piece without the notes of all other instruments; it is as long as before."""
    return replace(score, notes=tuple(note for note in score.notes if _part(note).instrument in instruments))


def cut(score: Score, start: float, seconds: float) -> Score:
    """The part of a piece from `start` (seconds) on, `seconds` long, beginning at zero.

    Tempo, programs, controllers and the like are as they would be there. A pitched note that sounds across the cut is
    struck again at it, a drum is not: what is written is what will be heard, and nothing before the cut is.
    """
    first, last = score.tick(start), score.tick(start + seconds)
    notes = tuple(
        note._replace(start=max(note.start, first) - first, end=min(note.end, last) - first)
        for note in score.notes
        if note.start < last and note.end > first and (note.start >= first or note.program != DRUM_PROGRAM)
    )
    before = [event.message for event in score.events if event.tick < first]
    events = [Event(0, message) for message in _state(before)]
    events += [Event(event.tick - first, event.message) for event in score.events if first <= event.tick < last]
    return Score(score.ticks_per_beat, notes, tuple(events), min(score.end, last) - first)


def write(score: Score, parts: Iterable[Part], *, fade: float = TAIL) -> bytes:
    """A standard MIDI file with one track per part (type 0 for a single part, else type 1).

    Parameters
    ----------
    score
        The piece.
    parts
        Which of its parts.
    fade
        Seconds for which the file goes on after the piece's end, so that a synthesiser plays the last notes out.
    """
    parts = list(parts)
    shared = [(event.tick, 0, event.message) for event in score.events if event.message.is_meta]
    file = mido.MidiFile(type=0 if len(parts) == 1 else 1, ticks_per_beat=score.ticks_per_beat, charset="latin-1")
    if len(parts) != 1:
        file.tracks.append(_track(shared, score.end))
        shared = []
    end = score.tick(score.length + fade)
    for part in parts:
        file.tracks.append(_track(shared + _messages(score, part), end, channel=part.channel))
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def busiest(score: Score, seconds: float, *, step: float = 0.5, share: float = 0.25) -> float:
    """Where to cut a window in which as many instruments as possible play.

    An instrument counts if its notes cover at least `share` of the window. Among windows with equally many, the one
    in which the instruments' coverage sums highest wins, and then the earliest. Drums are struck, not held: each
    stroke counts as a quarter of a second.

    Parameters
    ----------
    score
        The piece.
    seconds
        Length of the window.
    step
        Windows begin at multiples of this many seconds.

    Returns
    -------
    float
        The window's start in seconds; 0 if the piece is no longer than the window.
    """
    if score.length <= seconds:
        return 0.0
    cell = step / 5
    width = round(seconds / cell)
    playing: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(int(score.length / cell) + 1, dtype=bool))
    for note in score.notes:
        part = _part(note)
        start, end = score.seconds(note.start), score.seconds(note.end)
        end = max(end, start + 0.25) if part.is_drum else end
        playing[part.instrument][int(start / cell) : int(end / cell) + 1] = True
    starts = np.arange(0, max(1, int((score.length - seconds) / cell) + 1), 5)
    counts = np.stack([np.concatenate([[0], np.cumsum(cells)]) for cells in playing.values()])
    coverage = (counts[:, np.minimum(starts + width, counts.shape[1] - 1)] - counts[:, starts]) / width
    rank = np.lexsort((starts, -coverage.sum(axis=0), -(coverage >= share).sum(axis=0)))
    return float(starts[rank[0]] * cell)


def _part(note: Note) -> Part:
    return Part(note.channel, note.program)


def _merged(tracks: Iterable[mido.MidiTrack]) -> list[tuple[int, mido.Message]]:
    """The messages of all tracks with their absolute ticks, in time; as mido does it, but without copying each twice."""
    timed: list[tuple[int, mido.Message]] = []
    for track in tracks:
        tick = 0
        for message in track:
            tick += message.time
            timed.append((tick, message))
    return sorted(timed, key=lambda entry: entry[0])


def _state(messages: Iterable[mido.Message]) -> list[mido.Message]:
    """The messages that leave a synthesiser in the same state as all of them, in their order.

    Of each kind only the last counts, except for those that mean something only as a sequence.
    """
    last: dict[object, int] = {}
    for index, message in enumerate(messages := list(messages)):
        last[_kind(index, message)] = index
    return [messages[index] for index in sorted(last.values())]


def _kind(index: int, message: mido.Message) -> object:
    """What a later message of the same kind replaces; `index` for one that is never replaced."""
    if message.type == "control_change" and message.control not in SEQUENCED_CONTROLS:
        return message.type, message.channel, message.control
    if message.type == "program_change":
        # a part keeps the changes to its own program only, so each program's last one has to stay
        return message.type, message.channel, message.program
    if message.type in ("pitchwheel", "aftertouch"):
        return message.type, message.channel
    if message.type == "polytouch":
        return message.type, message.channel, message.note
    return message.type if message.type in META else index


def _messages(score: Score, part: Part) -> list[tuple[int, int, mido.Message]]:
    """(tick, order within the tick, message) of a part: notes end, controls change, notes begin."""
    found: list[tuple[int, int, mido.Message]] = []
    for tick, message in score.events:
        if message.is_meta:
            continue
        if message.type != "sysex" and message.channel != part.channel:
            continue
        if message.type == "program_change" and not part.is_drum and message.program != part.program:
            continue
        found.append((tick, 2, message))
    for note in score.notes:
        if _part(note) == part:
            on = mido.Message("note_on", channel=note.channel, note=note.pitch, velocity=note.velocity)
            off = mido.Message("note_off", channel=note.channel, note=note.pitch)
            found += [(note.start, 3, on), (note.end, 1, off)]
    return found


def _track(timed: list[tuple[int, int, mido.Message]], end: int, channel: int | None = None) -> mido.MidiTrack:
    """A track of messages at absolute ticks; one with a channel closes with a message that means nothing.

    Synthesisers stop at a track's last event and disregard how far off its end is.
    """
    track = mido.MidiTrack()
    now = 0
    for tick, _, message in sorted(timed, key=lambda entry: entry[:2]):
        track.append(message.copy(time=tick - now))
        now = tick
    if channel is not None:
        # controller 119 is undefined
        track.append(mido.Message("control_change", channel=channel, control=119, value=0, time=max(0, end - now)))
    track.append(mido.MetaMessage("end_of_track", time=0 if channel is not None else max(0, end - now)))
    return track
