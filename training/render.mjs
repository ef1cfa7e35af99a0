// Renders the subjects of subjects.txt in every style to RGBA pictures, with their names and keywords.
//
// usage: node render.mjs NODE_MODULES OUT_FOLDER [SIZE]
// Writes OUT_FOLDER/art.rgba (SIZE x SIZE x 4 bytes a picture, colours premultiplied by alpha, one after the other) and
// OUT_FOLDER/art.json ({size, pictures: [{name, aliases, style, keywords}]}, in the same order).
import { mkdirSync, openSync, readFileSync, writeFileSync, writeSync } from 'fs';
import { createRequire } from 'module';
import { join, resolve } from 'path';

const [modules, out, sizeText] = process.argv.slice(2);
const size = Number(sizeText ?? 160);
const { Resvg } = createRequire(resolve(modules, 'x.js'))('@resvg/resvg-js');
const json = (path) => JSON.parse(readFileSync(join(modules, path)));
const STYLES = { flat: 'fluent-emoji-flat', glossy: 'fluent-emoji', noto: 'noto' };

const slug = (s) => s.toLowerCase().replace(/[^a-z0-9]+/g, '-').replace(/^-|-$/g, '');
const emoji = Object.fromEntries(
  Object.entries(json('unicode-emoji-json/data-by-emoji.json')).map(([char, e]) => [e.name, char]),
);
const keywords = json('emojilib/dist/emoji-en-US.json');

/** The subjects: their name in Unicode's list and the other words for them. */
function subjects() {
  const text = readFileSync(new URL('./subjects.txt', import.meta.url), 'utf8');
  return text.split('\n').filter((line) => line.trim() && !line.startsWith('#')).map((line) => {
    const [name, others] = line.split('=').map((s) => s.trim());
    if (!(name in emoji)) throw new Error(`subjects.txt: "${name}" is not a name in Unicode's list`);
    return { name, aliases: others ? others.split(',').map((s) => s.trim()) : [] };
  });
}

/** An icon of an iconify set as RGBA pixels, or nothing where the set lacks it or it is not square. */
function render(set, name) {
  const icon = set.icons[name] ?? set.icons[set.aliases?.[name]?.parent];
  if (!icon) return null;
  const w = icon.width ?? set.width, h = icon.height ?? set.height;
  const box = `${icon.left ?? 0} ${icon.top ?? 0} ${w} ${h}`;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="${box}">${icon.body}</svg>`;
  const picture = new Resvg(svg, { fitTo: { mode: 'width', value: size } }).render();
  return picture.width === size && picture.height === size ? picture.pixels : null;
}

mkdirSync(out, { recursive: true });
const file = openSync(join(out, 'art.rgba'), 'w');
const pictures = [];
for (const [style, folder] of Object.entries(STYLES)) {
  const set = json(`@iconify-json/${folder}/icons.json`);
  for (const { name, aliases } of subjects()) {
    const pixels = render(set, slug(name));
    if (!pixels) {
      console.warn(`no ${style} art for ${name}`);
      continue;
    }
    writeSync(file, pixels);
    const words = (keywords[emoji[name]] ?? []).map((k) => k.replace(/_/g, ' ').toLowerCase());
    pictures.push({ name, aliases, style, keywords: words });
  }
}
writeFileSync(join(out, 'art.json'), JSON.stringify({ size, pictures }));
console.log(pictures.length, 'pictures');
