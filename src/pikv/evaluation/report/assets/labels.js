// Text beside charts: how wide it is, cut where there is no room, moved apart where it would overlap.
const LABEL_FONT = "12px system-ui, sans-serif";
const LABEL_HEIGHT = 17;
const measureContext = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  measureContext.font = LABEL_FONT;
  return Math.ceil(measureContext.measureText(text).width);
}

function cut(text, width) {
  if (textWidth(text) <= width) return text;
  let length = text.length;
  while (length > 1 && textWidth(`${text.slice(0, length)}…`) > width) length -= 1;
  return `${text.slice(0, length)}…`;
}

// Places for labels as near to the wanted ones as they get without overlaps: neighbours that touch make one block, which
// stands where its members want to be on average. `wanted` ascends.
function spread(wanted, gap, top, bottom) {
  const blocks = [];
  for (const place of wanted) {
    let block = { sum: place, count: 1 };
    block.start = clamp(place, block);
    while (blocks.length && blocks.at(-1).start + blocks.at(-1).count * gap > block.start) {
      const above = blocks.pop();
      block = { sum: above.sum + block.sum - above.count * block.count * gap, count: above.count + block.count };
      block.start = clamp(block.sum / block.count, block);
    }
    blocks.push(block);
  }
  return blocks.flatMap((block) => Array.from({ length: block.count }, (_, index) => block.start + index * gap));

  function clamp(start, block) {
    return Math.max(top, Math.min(start, bottom - (block.count - 1) * gap));
  }
}
