// Draws an action chunk [H, D] as a grid, unmasked up to a round: rows are dimensions, columns are steps.
// Pure functions of their arguments but for `drawChunk`, so that they can be tried in a console.

// How a slot looks after `round` rounds: "masked", "known" or its confidence in 0..1.
export function slotState(chunk, step, dim, round) {
  const committed = chunk.committed?.length ? chunk.committed[step][dim] : 1;
  if (committed === 0) return "known";
  if (committed > round) return "masked";
  return chunk.confidence?.length ? chunk.confidence[step][dim] : 1;
}

// How many slots are committed or known after `round` rounds.
export function countVisible(chunk, round) {
  let count = 0;
  chunk.actions.forEach((row, step) => row.forEach((_, dim) => { count += slotState(chunk, step, dim, round) !== "masked"; }));
  return count;
}

export function lastRound(chunk) {
  const committed = chunk.committed?.length ? chunk.committed.flat() : [1];
  return Math.max(1, ...committed);
}

// Yellow at 0, green at 0.5, deep green at 1: the colours of the legend.
export function colourOf(confidence, style) {
  const stops = ["--low", "--middle", "--high"].map((name) => rgb(style.getPropertyValue(name).trim()));
  const place = Math.min(0.9999, Math.max(0, confidence)) * 2;
  const [from, to] = [stops[Math.floor(place)], stops[Math.floor(place) + 1]];
  const mixed = from.map((value, index) => Math.round(value + (to[index] - value) * (place % 1)));
  return `rgb(${mixed.join(" ")})`;
}

export function drawChunk(canvas, chunk, round) {
  const steps = chunk.actions.length, dims = chunk.actions[0].length;
  const style = getComputedStyle(document.documentElement);
  const pen = canvas.getContext("2d");
  const width = canvas.width / steps, height = canvas.height / dims;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `${Math.min(14, width / 4, height / 2)}px ui-monospace, monospace`;
  for (let step = 0; step < steps; step += 1) {
    for (let dim = 0; dim < dims; dim += 1) {
      const state = slotState(chunk, step, dim, round);
      const named = state === "masked" || state === "known";
      pen.fillStyle = named ? style.getPropertyValue(`--${state}`) : colourOf(state, style);
      pen.fillRect(step * width + 1, dim * height + 1, width - 2, height - 2);
      if (state === "masked") continue;
      pen.fillStyle = !named && state > 0.6 ? "#fff" : "#1b1f24";
      pen.fillText(chunk.actions[step][dim].toFixed(2), (step + 0.5) * width, (dim + 0.5) * height);
    }
  }
}

function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}
