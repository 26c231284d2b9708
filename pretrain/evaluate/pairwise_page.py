"""The judging page: one HTML file that holds its pictures, asks for the better of each pair, and exports the votes.

Nothing in it tells whose picture is whose: pictures are coded anew, without file names and the settings that `pretrain.sample`
writes into them, and a pair's name is a hash. What stands on which side follows from the seed, for who has both folders.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape

from PIL import Image

from data_prep.common.progress import LOG_SECONDS, Progress
from pretrain.evaluate.pairs import Drawn, Placed, opened, page_id

STYLE = """
:root { color-scheme: dark; --ground: #222427; --raised: #303337; --line: #4a4d52; --text: #ececec; --dim: #a3a7ac;
  --mark: #f2b84b; --prompt: 3.6rem; }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; min-height: 100vh; display: flex; flex-direction: column; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
progress { display: block; width: 100%; height: 5px; appearance: none; border: 0; background: var(--raised); }
progress::-webkit-progress-bar { background: var(--raised); }
progress::-webkit-progress-value { background: var(--mark); transition: width .2s; }
progress::-moz-progress-bar { background: var(--mark); }
header { display: flex; justify-content: space-between; padding: .6rem 1.5rem 0; color: var(--dim); font-size: 14px; }
main { flex: 1; display: flex; flex-direction: column; justify-content: center; align-items: center; padding: .5rem 1.5rem 1.2rem;
  text-align: center; }
h1 { margin: 0; font-size: 1rem; font-weight: 400; color: var(--dim); }
blockquote { margin: .1rem auto .9rem; max-width: 70rem; height: var(--prompt); overflow: auto; display: grid;
  align-items: safe center; font-size: 1.3rem; line-height: 1.35; }
.long { --prompt: 5.2rem; }
.long blockquote { font-size: .95rem; }
.pair { --side: min(45vw, 100vh - 11.4rem - var(--prompt), 1024px);
  display: flex; justify-content: center; gap: min(2rem, 2.5vw); }
.pair button { padding: 0; border: 0; background: none; cursor: pointer; border-radius: 8px; outline: 4px solid transparent;
  outline-offset: 4px; transition: outline-color .1s; }
.pair button:hover { outline-color: var(--line); }
.pair button.chosen { outline-color: var(--mark); }
.pair img { display: block; width: var(--side); height: var(--side); object-fit: contain; border-radius: 5px;
  box-shadow: 0 0 0 1px var(--line); }
.keys { display: flex; flex-wrap: wrap; justify-content: center; gap: .8rem; margin-top: 1.3rem; }
.keys button, .card button { font: inherit; color: var(--text); background: var(--raised); border: 1px solid var(--line);
  border-radius: 8px; padding: .35rem .9rem; cursor: pointer; }
.keys button:hover:enabled, .card button:hover { border-color: var(--dim); }
.keys button:disabled { opacity: .35; cursor: default; }
.keys button.chosen { border-color: var(--mark); color: var(--mark); }
.card button.first { background: var(--mark); border-color: var(--mark); color: #222427; font-weight: 600; }
kbd { font: 600 14px/1 system-ui, sans-serif; color: var(--dim); }
button kbd { margin-right: .45rem; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: .45rem 1.1rem; margin: 0 0 1.2rem; }
.card dt { color: var(--dim); font-size: 14px; }
.card dd { margin: 0; }
.card dt kbd { display: inline-block; min-width: 2rem; padding: .3rem .5rem; color: var(--text); text-align: center;
  background: var(--ground); border: 1px solid var(--line); border-radius: 6px; }
.card { max-width: 34rem; padding: 2rem 2.4rem; background: var(--raised); border-radius: 14px; text-align: left; }
.card h2 { margin: 0 0 .6rem; font-size: 1.35rem; }
.card p { margin: 0 0 1rem; }
.card label { display: block; color: var(--dim); font-size: 14px; }
.card input { width: 100%; margin: .2rem 0 1.2rem; padding: .5rem .7rem; font: inherit; color: var(--text);
  background: var(--ground); border: 1px solid var(--line); border-radius: 8px; }
.card .row { display: flex; flex-wrap: wrap; gap: .7rem; }
#kept { color: var(--dim); font-size: 14px; }
.card button { background: var(--ground); }
.link { border: 0; background: none; padding: 0; margin-left: .8rem; font: inherit; color: var(--dim); text-decoration: underline;
  cursor: pointer; }
"""

BODY = """
<progress id="bar" max="1" value="0"></progress>
<header><span id="place" aria-live="polite"></span><span id="who" hidden><span id="judge"></span>
<button class="link" id="save">save votes so far</button><button class="link" id="change">another judge</button></span></header>
<main>
<form class="card" id="start" hidden>
<h2>Two pictures, one choice</h2>
<p>You will see <span id="number"></span>, each drawn from the text above it. <b id="asked"></b></p>
<dl><dt><kbd>←</kbd><dd>the left one<dt><kbd>→</kbd><dd>the right one<dt><kbd>↓</kbd> or <kbd>space</kbd><dd>no difference
<dt><kbd>⌫</kbd><dd>back to the pair before</dl>
<p id="kept">Your votes stay in this browser: you may close the page and go on later. At the end you save them as a file.</p>
<label for="name">Your name</label>
<input id="name" required maxlength="80" autocomplete="off" pattern=".*\\S.*" title="a name">
<button class="first">Begin</button>
</form>
<section id="vote" hidden>
<h1 id="question"></h1>
<blockquote id="prompt" dir="auto"></blockquote>
<div class="pair">
<button data-choice="left" tabindex="-1"><img alt="left picture" id="left"></button>
<button data-choice="right" tabindex="-1"><img alt="right picture" id="right"></button>
</div>
<div class="keys">
<button data-choice="left" tabindex="-1"><kbd>←</kbd>left</button>
<button data-choice="tie" tabindex="-1"><kbd>↓</kbd>no difference</button>
<button data-choice="right" tabindex="-1"><kbd>→</kbd>right</button>
<button id="back" tabindex="-1"><kbd>⌫</kbd>back</button>
</div>
</section>
<section class="card" id="end" hidden>
<h2>Done, thank you</h2>
<p>All pairs have your vote. Save the file of your votes and send it to whoever gave you this page.</p>
<div class="row"><button class="first" id="download">Save votes</button>
<button id="revise"><kbd>⌫</kbd>back to the last pair</button></div>
</section>
</main>
"""

# Votes are a list in the order of the pairs: its length is the place, going back takes the last one off.
SCRIPT = """
"use strict";
const page = JSON.parse(document.getElementById("page").textContent);
const at = id => document.getElementById(id);
const KEYS = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", " ": "tie"};
const STORE = "pairwise-" + page.id;
const UNKEPT = "This browser keeps no data of pages: do not close this one before you have saved your votes.";
let judge = null, votes = [], resting = false;

function keep(key, value) {
  try { localStorage.setItem(key, value); }
  catch (error) { at("kept").textContent = UNKEPT; at("who").title = UNKEPT; }
}
function kept(key) {
  try { return localStorage.getItem(key); }
  catch (error) { at("kept").textContent = UNKEPT; return null; }
}

function begin(name) {
  judge = name;
  votes = JSON.parse(kept(STORE + "/" + judge) || "[]");
  keep(STORE, judge);
  show();
}
function vote(choice) {
  if (judge === null || resting || votes.length === page.pairs.length) return;
  votes.push(choice);
  keep(STORE + "/" + judge, JSON.stringify(votes));
  resting = true;
  for (const b of document.querySelectorAll(`[data-choice=${choice}]`)) b.classList.add("chosen");
  setTimeout(() => { resting = false; show(); }, 160);
}
function back() {
  if (judge === null || resting || !votes.length) return;
  votes.pop();
  keep(STORE + "/" + judge, JSON.stringify(votes));
  show();
}
function show() {
  const n = page.pairs.length, i = votes.length, pair = page.pairs[i];
  at("start").hidden = judge !== null;
  at("vote").hidden = judge === null || i === n;
  at("end").hidden = judge === null || i < n;
  at("who").hidden = judge === null;
  at("save").hidden = i === 0 || i === n;
  at("judge").textContent = judge || "";
  at("bar").value = judge === null ? 0 : i / n;
  at("place").textContent = judge === null ? "" : i === n ? `${n} of ${n}` : `${i + 1} of ${n}`;
  at("back").disabled = i === 0;
  for (const b of document.querySelectorAll(".chosen")) b.classList.remove("chosen");
  if (judge === null) at("name").focus();
  else if (i === n) at("download").focus();
  else {
    document.activeElement.blur();
    at("prompt").textContent = pair.prompt;
    at("left").src = pair.left;
    at("right").src = pair.right;
  }
}
function save() {
  const {id, seed, question, side, pairs} = page;
  const ballot = {page: id, seed, question, side, pairs: pairs.length, judge,
    votes: votes.map((choice, i) => ({pair: pairs[i].id, choice}))};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(ballot, null, 1) + "\\n"], {type: "application/json"}));
  link.download = `votes_${judge.replace(/[^\\p{L}\\p{N}]+/gu, "_")}_${id.slice(0, 6)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

if (page.pairs.some(pair => pair.prompt.length > 150)) document.body.classList.add("long");
at("question").textContent = at("asked").textContent = page.question;
at("number").textContent = page.pairs.length === 1 ? "one pair of pictures" : page.pairs.length + " pairs of pictures";
at("start").addEventListener("submit", event => { event.preventDefault(); begin(at("name").value.trim()); });
for (const b of document.querySelectorAll("[data-choice]")) b.addEventListener("click", () => vote(b.dataset.choice));
for (const id of ["back", "revise"]) at(id).addEventListener("click", back);
for (const id of ["save", "download"]) at(id).addEventListener("click", save);
at("change").addEventListener("click", () => { judge = null; votes = []; at("name").value = ""; keep(STORE, ""); show(); });
document.addEventListener("keydown", event => {
  if (judge === null || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = KEYS[event.key];
  if (choice && votes.length < page.pairs.length) { event.preventDefault(); if (!event.repeat) vote(choice); }
  else if (event.key === "Backspace") { event.preventDefault(); if (!event.repeat) back(); }
});
if (kept(STORE)) begin(kept(STORE)); else show();
"""
LARGEST = 400 * 10**6  # bytes of a page's pictures; a string of Chromium's ends at 512 MiB
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def judging_page(placed: Sequence[Placed], question: str, seed: int, side: int | None) -> str:
    """The page's HTML.

    side: pictures whose longer side has more px are brought to it; None leaves all as they are.

    Raises ValueError for a page that browsers would not open.
    """
    pairs: list[dict[str, str]] = []
    size = 0
    with Progress(len(placed), "pair", line_seconds=LOG_SECONDS) as progress:
        for p in placed:
            left, right = _data(p.left, side), _data(p.right, side)
            size += len(left) + len(right)
            if size > LARGEST:
                raise ValueError(
                    f"the page's pictures have more than {LARGEST // 10**6} MB, which browsers do not open: "
                    f"give --pairs {len(pairs)} at most, or a smaller --side"
                )
            pairs.append({"id": p.pair.id, "prompt": p.pair.a.prompt, "left": left, "right": right})
            progress.update(1)
    content = {
        "id": page_id(placed, question, seed, side),
        "seed": seed,
        "question": question,
        "side": side,
        "pairs": pairs,
    }
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(question)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<style>{STYLE}</style></head>\n<body>{BODY}"
        # Nothing in the text may end the element.
        f'<script type="application/json" id="page">{json.dumps(content).replace("<", chr(92) + "u003c")}</script>\n'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _data(drawn: Drawn, side: int | None) -> str:
    """A picture as a data URI: lossless WebP, which is smaller than PNG, of its pixels alone."""
    image = opened(drawn.path)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
