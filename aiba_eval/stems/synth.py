"""From the MIDI of one part to its sound."""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mido
import numpy as np

from .errors import MissingDependency, StemsError, find_program

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Engine(Protocol):
    """What turns a part into sound. It must be linear and dry: parts rendered apart have to add up to the piece.

    Attributes
    ----------
    name
        For the metadata, with a version if there is one.
    soundfont, licence, notice
        The sounds' name, the short name of their licence and its text.
    """

    @property
    def name(self) -> str: ...

    @property
    def soundfont(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def notice(self) -> str: ...

    def render(self, midi: Path, sample_rate: int) -> NDArray[np.float32]:
        """The sound of a MIDI file: float32 [n], mono."""
        ...


class SoundFont(NamedTuple):
    """A soundfont that is known: where it lies, under which licence, and what installs it."""

    path: str
    licence: str
    package: str


SOUNDFONTS = (
    SoundFont("/usr/share/sounds/sf2/FluidR3_GM.sf2", "MIT", "fluid-soundfont-gm"),
    SoundFont("/usr/share/sounds/sf3/MuseScore_General_Lite.sf3", "MIT", "musescore-general-soundfont-small"),
    SoundFont("/usr/share/sounds/sf2/TimGM6mb.sf2", "GPL-2.0", "timgm6mb-soundfont"),
)


@dataclass(frozen=True)
class FluidSynth:
    """The FluidSynth program, with reverb and chorus off.

    Attributes
    ----------
    executable
        The program.
    path
        The soundfont.
    version
        The program's version.
    """

    executable: str
    path: Path
    version: str

    @property
    def name(self) -> str:
        return f"fluidsynth {self.version}"

    @property
    def soundfont(self) -> str:
        return self.path.name

    @property
    def licence(self) -> str:
        return _licence(self.path)

    @property
    def notice(self) -> str:
        return _notice(self.path)

    def render(self, midi: Path, sample_rate: int) -> NDArray[np.float32]:
        import soundfile

        # beside the MIDI, so that what a killed run leaves lies in the folder that the next run clears
        with tempfile.TemporaryDirectory(dir=midi.parent) as folder:
            wave = Path(folder) / "part.wav"
            # 1024 voices: a stolen voice would make a part sound otherwise alone than together
            command = [self.executable, "-ni", "-q", "-R", "0", "-C", "0", "-g", "0.3", "-r", str(sample_rate)]
            command += ["-o", "synth.polyphony=1024", "-O", "float", "-T", "wav", "-F", str(wave)]
            command += [str(self.path), str(midi)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not wave.is_file():
                reason = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
                raise StemsError(f"fluidsynth could not render {midi.name}: {reason}")
            audio, _ = soundfile.read(wave, dtype="float32", always_2d=True)
        return audio.mean(axis=1, dtype=np.float32)


@dataclass(frozen=True)
class TinySoundFont:
    """The `tinysoundfont` package: nothing to install but wheels, 44.1 kHz at about 100 times real time.

    Its own sequencer is not used: that places events at the edges of blocks, which differ from part to part.

    Attributes
    ----------
    path
        The soundfont.
    """

    path: Path

    @property
    def name(self) -> str:
        return "tinysoundfont"

    @property
    def soundfont(self) -> str:
        return self.path.name

    @property
    def licence(self) -> str:
        return _licence(self.path)

    @property
    def notice(self) -> str:
        return _notice(self.path)

    def render(self, midi: Path, sample_rate: int) -> NDArray[np.float32]:
        import tinysoundfont

        synth = tinysoundfont.Synth(gain=-12.0, samplerate=sample_rate)
        font = synth.sfload(str(self.path))
        for channel in range(16):
            synth.program_select(channel, font, 0, 0, channel == 9)
        blocks: list[NDArray[np.float32]] = []
        now, position = 0.0, 0
        for message in mido.MidiFile(midi, clip=True, charset="latin-1"):
            now += message.time
            count = round(now * sample_rate) - position
            if count > 0:
                stereo = np.frombuffer(bytes(synth.generate(count)), dtype=np.float32).reshape(-1, 2)
                blocks.append(stereo.mean(axis=1, dtype=np.float32))
                position += count
            _play(synth, font, message)
        return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)


def engine(name: str, soundfont: str | Path | None = None) -> Engine:
    """The engine of that name, with a soundfont that is there.

    Parameters
    ----------
    name
        `fluidsynth` (best sound) or `tinysoundfont` (needs no system packages).
    soundfont
        An `.sf2` or `.sf3` file; None takes the first of `SOUNDFONTS` that is installed, or for tinysoundfont the one
        inside pretty_midi.

    Raises
    ------
    MissingDependency
        If the program, the package or the soundfont is not there.
    StemsError
        If there is no such engine.
    """
    if name == "fluidsynth":
        executable = find_program("fluidsynth", "apt-get install fluidsynth fluid-soundfont-gm")
        path = _soundfont(soundfont)
        done = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False)
        words = done.stdout.split()
        version = words[words.index("version") + 1] if "version" in words[:-1] else "unknown"
        return FluidSynth(executable, path, version)
    if name == "tinysoundfont":
        if importlib.util.find_spec("tinysoundfont") is None:
            # without its dependencies: it asks for pyaudio, for playing only, which wants a compiler and PortAudio
            raise MissingDependency("the package tinysoundfont is missing: pip install --no-deps tinysoundfont")
        return TinySoundFont(_soundfont(soundfont) if soundfont else _bundled_soundfont())
    raise StemsError(f"no engine {name!r}; there are 'fluidsynth' and 'tinysoundfont'")


def _soundfont(path: str | Path | None) -> Path:
    if path is None:
        found = next((Path(known.path) for known in SOUNDFONTS if Path(known.path).is_file()), None)
        if found is None:
            raise MissingDependency("no General MIDI soundfont is installed: apt-get install fluid-soundfont-gm")
        return found
    path = Path(path)
    if not path.is_file():
        known = next((known for known in SOUNDFONTS if Path(known.path).name == path.name), SOUNDFONTS[0])
        raise MissingDependency(f"no soundfont at {path}: apt-get install {known.package}, which has {known.path}")
    return path


def _bundled_soundfont() -> Path:
    """TimGM6mb.sf2, which the wheel of pretty_midi holds."""
    spec = importlib.util.find_spec("pretty_midi")
    if spec is None or spec.origin is None:
        raise MissingDependency("the package pretty_midi, whose soundfont is used, is missing: pip install pretty_midi")
    path = Path(spec.origin).parent / "TimGM6mb.sf2"
    if not path.is_file():
        raise MissingDependency(f"pretty_midi came without {path.name}: apt-get install timgm6mb-soundfont")
    return path


def _known(path: Path) -> SoundFont | None:
    return next((known for known in SOUNDFONTS if Path(known.path).name == path.name), None)


def _licence(path: Path) -> str:
    known = _known(path)
    return known.licence if known else "unknown"


def _notice(path: Path) -> str:
    known = _known(path)
    if known is None:
        return f"The licence of {path.name} is not known here: look it up before you pass the audio on.\n"
    text = Path("/usr/share/doc") / known.package / "copyright"
    if text.is_file() and path == Path(known.path):
        return text.read_text(encoding="utf-8", errors="replace")
    return (
        f"{path.name} is under the licence {known.licence}; its full text is in the Debian package {known.package}.\n"
    )


def _play(synth: Any, font: int, message: mido.Message) -> None:
    """Hand one message to a tinysoundfont synthesiser."""
    if message.is_meta or message.type == "sysex":
        return
    channel = message.channel
    if message.type == "note_on" and message.velocity > 0:
        synth.noteon(channel, message.note, message.velocity)
    elif message.type in ("note_on", "note_off"):
        synth.noteoff(channel, message.note)
    elif message.type == "control_change":
        synth.control_change(channel, message.control, message.value)
    elif message.type == "pitchwheel":
        synth.pitchbend(channel, message.pitch + 8192)
    elif message.type == "program_change":
        try:
            synth.program_select(channel, font, 0, message.program, channel == 9)
        except RuntimeError:  # a soundfont without that preset or drum kit plays its first one
            synth.program_select(channel, font, 0, 0, channel == 9)
