"""CLIP's true vocabulary, and the token ids that transformers makes of awkward prompts.

The vocabulary is the list of merges of OpenAI's `simple_tokenizer.py` (MIT), which the package open_clip_torch ships. The asset keeps the
48,894 of its lines that CLIP uses; everything else follows from them by rule.
"""

import gzip
import json
import shutil
import tempfile
from pathlib import Path

import open_clip
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

from checkpoints import FIXTURES, ROOT, TOKENIZER
from fixture import write_json
from layouts import BOS, EOS, token

ASSET = ROOT / "crates/hypergen-diffusion/assets/clip_merges.txt.gz"
MERGES = 49152 - 256 - 2

PROMPTS = [
    "",
    " ",
    "   \t\n  ",
    "a photo of a cat",
    "A Photo OF a CAT",
    "red apple, blue background",
    "  leading and trailing  ",
    "double  spaces\tand\ttabs\nand\r\nlines",
    "comma,comma,comma;semi:colon",
    "hello!",
    "hello! what a day!! wow!!! !",
    "!",
    "!!!!",
    "it's we're they've I'm he'll she'd don't",
    "IT'S WE'RE THEY'VE I'M HE'LL SHE'D DON'T",
    "it’s we’re (curly quotes)",
    "rock'n'roll 'quoted' ''",
    "1 12 123 1234 3.14159 1,000,000 1st 2nd 007",
    "½ ² Ⅷ ① ٣ 三 ௧",
    "4k 8K UHD f/1.8 50mm iso100 #nofilter @artist",
    "(masterpiece:1.2), [bad], {curly} <lora:x:0.5>",
    "<b>bold</b> &amp; &lt;i&gt; &#39;x&#39; <br/>",
    "https://example.org/path?q=1&r=2#top",
    "snake_case CamelCase kebab-case dotted.name",
    "100% $5 €10 £3 ¥7 ₿1",
    "C++ C# F# .NET a+b=c x^2 ~y | z \\ w",
    "naïve café Ångström ÜBER straße ẞ",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m",
    "İstanbul ıI Iİ",
    "ΑΒΓ αβγ ΣΊΣΥΦΟΣ ς",
    "Привет, МИР! ёлка",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "カフェの猫 ☕",
    "東京タワーの夜景、浮世絵",
    "红苹果，蓝色背景",
    "안녕하세요 세계",
    "\u1112\u1161\u11ab\u1100\u1173\u11af (decomposed Hangul)",
    "ﬁligree ﬀ Ａ１ ｶﾀｶﾅ",
    "🍎",
    "a 🍎 and a 🚀!",
    "👨‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪🇫🇷",
    "👍🏽 skin tone ❤️ heart",
    "🦊🐻🐼",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeffbom",
    "soft\u00adhyphen no\u00a0break thin\u2009space ideographic\u3000space",
    "next\u0085line line\u2028separator paragraph\u2029end",
    "form\x0cfeed vertical\x0btab unit\x1fseparator file\x1cseparator",
    "mongolian\u180evowel word\u2060joiner",
    "bell\x07 escape\x1b[31m null\x00end del\x7f",
    "private \ue000 use, \ufffd replacement, \U000f0000 plane 15",
    "𝔊𝔬𝔱𝔥𝔦𝔠 𝕕𝕠𝕦𝕓𝕝𝕖 𝐁𝐎𝐋𝐃",
    "z̴̢̛a̷͎l̶̨g̸o̵",
    "“quotes” ‘single’ — dash – en … dots",
    "•bullet ✓check ★star →arrow ∞",
    "<|startoftext|>",
    "<|endoftext|>",
    "before <|endoftext|> after",
    "glued<|endoftext|>together <|startoftext|>x",
    "<|EndOfText|> <|STARTOFTEXT|>",
    "<|endoftext |> <| endoftext|> |endoftext|",
    "</w> a</w> hello</w>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "a " * 75,
    "a " * 76,
    "a " * 200,
    "very long prompt with many words, " * 30,
    "🍎" * 100,
    "漢字" * 60,
    "word " * 74 + "<|endoftext|> tail",
    "intricate, elegant, highly detailed, digital painting, artstation, concept art, smooth, sharp focus, illustration",
    "Ｆｕｌｌｗｉｄｔｈ　ｔｅｘｔ！",
    "ǅ ǈ ŉ ΐ ﬃ (odd case mappings)",
    "\u0301leading combining mark",
    "tab\tin'side's the'll",
    "ß ſ K Å (Kelvin and Angstrom signs)",
]


def added(content: str, **flags) -> dict:
    """A token as `added_tokens_decoder` lists it."""
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    return {"content": content, **plain, **flags}


CAT = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<dog>", "sks"]
CAT_IDS = {token: 49408 + i for i, token in enumerate(CAT)}
CAT_LISTED = {str(i): added(token) for token, i in CAT_IDS.items()}

# Tokens that were added to CLIP's vocabulary, by the files that say so; `tokenizer.json` is the embedded model's, with a longer list.
ADDED = {
    "added_tokens": {"added_tokens.json": CAT_IDS},
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": CAT_LISTED}},
    # With a decoder nothing else counts.
    "decoder_and_more": {
        "tokenizer_config.json": {"added_tokens_decoder": CAT_LISTED},
        "added_tokens.json": {**CAT_IDS, "fox": 49413},
        "special_tokens_map.json": {"additional_special_tokens": ["red"], "pad_token": "!"},
    },
    "flags": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "0": added("!", normalized=False, special=True),
                "49406": added(BOS, special=True),
                "49407": added(EOS, special=True),
                "49408": added("<cat-toy>", lstrip=True, rstrip=True),
                "49409": added("<cat-toy>_1", normalized=False),
                "49410": added("<cat-toy>_2", normalized=False, special=True),
                "49411": added("<Dog>", normalized=False),
                "49412": added("SKS", single_word=True),
                "49413": added("SKS_1", single_word=True),
            },
            "pad_token": "!",
        }
    },
    "special": {
        "tokenizer_config.json": {"additional_special_tokens": ["<dog>"], "mask_token": "a</w>"},
        "added_tokens.json": CAT_IDS,
    },
    "special_by_map": {
        "special_tokens_map.json": {"additional_special_tokens": ["<dog>"], "unk_token": added(EOS, normalized=True)},
        "added_tokens.json": {t: i for t, i in CAT_IDS.items() if t != "<dog>" and t != "sks"},
    },
    "tokenizer_json": {"tokenizer.json": [added(t, id=4316 + i, special=t == "sks", normalized=t != "sks") for i, t in enumerate(CAT)]},
    "tokenizer_json_and_decoder": {
        "tokenizer.json": [added(t, id=4316 + i) for i, t in enumerate(CAT)],
        "tokenizer_config.json": {"added_tokens_decoder": {str(4316 + i): added(t, normalized=False) for i, t in enumerate(CAT)}},
    },
}
ADDED_PROMPTS = [
    "a photo of <cat-toy>",
    "A PHOTO OF <CAT-TOY>!",
    "<cat-toy>",
    "<cat-toy><cat-toy> <cat-toy>",
    "  <cat-toy>  ,<cat-toy>s and my<cat-toy>",
    "<cat-toy>_1 alone",
    "<cat-toy> <cat-toy>_1",
    "<cat-toy>_2 of <cat-toy>_3",
    "a <dog> and a <Dog> and a <DOG>",
    "sks dog, SKS, sksy, a-sks, sks_1",
    "<cat-toy " + EOS + " cat-toy>",
    "a red fox!",
    "word " * 73 + "<cat-toy> tail",
    "caf\u00e9 <cat-toy>\u3000\u732b",
]


def byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in vocabulary order: printable Latin-1 first, then the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def write_asset() -> str:
    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(source.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    text = "\n".join(lines) + "\n"
    ASSET.parent.mkdir(parents=True, exist_ok=True)
    ASSET.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return text


# What each tokenizer folder pads with, and the form of its configuration: strings alone; the older one, with a second file that alone
# names the padding token; SDXL's, which lists the added tokens.
FOLDERS = {
    "eos": (EOS, "strings"),
    "exclamation": ("!", "strings"),
    "eos_older": (EOS, "older"),
    "exclamation_older": ("!", "older"),
    "eos_listed": (EOS, "listed"),
    "exclamation_listed": ("!", "listed"),
}


def write_folder(folder: Path, merges: str, pad: str, form: str) -> CLIPTokenizer:
    """A tokenizer folder as published."""
    letters = byte_letters()
    words = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges.splitlines()] + [BOS, EOS]
    vocab = {word: i for i, word in enumerate(words)}
    assert len(vocab) == len(words) == 49408
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    if form == "older":
        config |= {"bos_token": token(BOS, True), "eos_token": token(EOS, True), "unk_token": token(EOS, True)}
        config["pad_token"] = EOS
        special = {"bos_token": token(BOS), "eos_token": token(EOS), "pad_token": pad, "unk_token": token(EOS)}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    else:
        config |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    if form == "listed":
        added = {0: "!", 49406: BOS, 49407: EOS} if pad == "!" else {49406: BOS, 49407: EOS}
        config["added_tokens_decoder"] = {
            str(i): {**token(t), "normalized": t != "!", "special": True} for i, t in added.items()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def make(scratch: Path) -> None:
    merges = write_asset()
    rows, configs = {}, {}
    for name, (pad, form) in FOLDERS.items():
        folder = scratch / f"tokenizer_{name}"
        rows[name] = encode(write_folder(folder, merges, pad, form), 77)
        files = ("tokenizer_config.json", "special_tokens_map.json")
        configs[name] = {f: json.loads((folder / f).read_text()) for f in files if (folder / f).exists()}
    rows["emoji"] = encode(CLIPTokenizer.from_pretrained(TOKENIZER), 32)
    content = {"files": configs, "prompts": PROMPTS, "ids": rows, "added": with_added(scratch, merges)}
    write_json(FIXTURES / "tokens.json", content, 3)
    print(f"tokens: {len(PROMPTS)} prompts, {len(rows)} tokenizers, asset of {ASSET.stat().st_size} bytes")


def with_added(scratch: Path, merges: str) -> dict:
    """Ids of prompts with added tokens, as diffusers' pipelines make them: tokens of several vectors are written out first."""
    rows = {}
    for name, files in ADDED.items():
        folder, length = scratch / f"added_{name}", 77
        if "tokenizer.json" in files:
            shutil.copytree(TOKENIZER, folder)
            length = 32
        else:
            write_folder(folder, merges, EOS, "strings")
        for file, content in files.items():
            path = folder / file
            whole = json.loads(path.read_text()) if path.exists() else {}
            if file == "tokenizer.json":
                whole["added_tokens"] += content
            else:
                whole |= content
            path.write_text(json.dumps(whole))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        prompts = [TextualInversionLoaderMixin().maybe_convert_prompt(p, tokenizer) for p in ADDED_PROMPTS]
        rows[name] = {"files": files, **encode(tokenizer, length, prompts)}
    return {"prompts": ADDED_PROMPTS, "tokenizers": rows}


def encode(tokenizer: CLIPTokenizer, length: int, prompts: list[str] = PROMPTS) -> dict:
    """Ids as diffusers asks for them, without the padding at the end."""
    ids = []
    for prompt in prompts:
        row = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        assert len(row) == length
        while row and row[-1] == tokenizer.pad_token_id:
            row.pop()
        ids.append(row)
    return {"length": length, "pad": tokenizer.pad_token_id, "ids": ids}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
