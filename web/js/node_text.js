// Draws the text that a node of this pack returns (ui.text) below the node's widgets; while the node runs, its progress stands there.
// After a reload of the page the texts are read from ComfyUI's history of runs: they are outputs, not a part of the workflow.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const NAME = "mive_text";
const NUM_RUNS = 3; // read after a reload: the last run alone may have been cancelled, or of a part of the workflow
const LINE_HEIGHT = 14, CHARACTER_WIDTH = 6.2, MARGIN = 20; // in pixels, of the default font size

let progress; // what the running node shows: its execution id in `node`, `text`, and `after_cancel`

// An execution id is the node's number, after those of the subgraph nodes around it: "3" or "12:3".
function findByExecutionId(id) {
  let graph = app.rootGraph, node;
  for (const number of String(id).split(":")) {
    node = graph?.getNodeById(number);
    graph = node?.subgraph;
  }
  return node;
}

// A locator is "3" in the root graph and "UUID:3" in a subgraph.
function findByLocator(locator) {
  const [number, uuid] = locator.split(":").reverse();
  return (uuid ? app.rootGraph.subgraphs.get(uuid) : app.rootGraph)?.getNodeById(number);
}

const textWidget = (node) => node?.widgets?.find((widget) => widget.name === NAME);

function addTextWidget(node) {
  const box = document.createElement("div"), content = box.appendChild(document.createElement("div"));
  box.style.cssText = "overflow-y: auto; user-select: text; cursor: text";
  content.className = "comfy-multiline-input";
  content.style.cssText = `white-space: pre-wrap; overflow-wrap: anywhere; padding: 4px 6px; line-height: 1.4`;
  const countRows = (line) => Math.max(1, Math.ceil((line.length * CHARACTER_WIDTH) / (node.size[0] - 2 * MARGIN)));
  const getMinHeight = () => MARGIN + 10 + LINE_HEIGHT * content.textContent.split("\n").reduce((sum, line) => sum + countRows(line), 0);
  const widget = node.addDOMWidget(NAME, NAME, box, {
    getValue: () => content.textContent,
    setValue: (text) => { content.textContent = text; },
    getMinHeight, // of the classic canvas; the new nodes measure the element
    getMaxHeight: getMinHeight,
    serialize: false, // in prompts
  });
  widget.serialize = false; // in workflow files
  return widget;
}

function draw(node, text) {
  if (!node?.comfyClass?.startsWith("MiVE") || text === undefined) return;
  const lines = [text].flat().join("\n");
  if (!lines) { // a run without a warning, perhaps after one with
    if (textWidget(node)) node.removeWidget(textWidget(node));
    return;
  }
  const widget = textWidget(node) ?? addTextWidget(node);
  widget.value = lines;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

// Ends the progress shown, with a last text, or without one.
function endProgress(text) {
  if (!progress) return;
  const node = findByExecutionId(progress.node);
  if (text) draw(node, text);
  else if (textWidget(node)) node.removeWidget(textWidget(node));
  progress = undefined;
}

async function restore() {
  const read = async (path) => (await api.fetchApi(path)).json();
  const id = app.rootGraph.id;
  const { jobs } = await read(`/jobs?status=completed,failed,cancelled&limit=${NUM_RUNS}&workflow_id=${id}`);
  for (const job of jobs) {
    const { outputs } = await read(`/jobs/${job.id}`);
    if (app.rootGraph.id !== id) return; // another workflow was opened meanwhile
    for (const [executionId, output] of Object.entries(outputs ?? {})) {
      const node = findByExecutionId(executionId);
      if (!textWidget(node)) draw(node, output.text);
    }
  }
}

app.registerExtension({
  name: "MiVE.NodeText",
  setup() {
    api.addEventListener("mive.progress", ({ detail }) => {
      progress = detail;
      draw(findByExecutionId(progress.node), progress.text);
    });
    api.addEventListener("executed", ({ detail }) => {
      if (progress?.node === detail.node && detail.output?.text) progress = undefined;
      draw(findByExecutionId(detail.display_node ?? detail.node), detail.output?.text);
    });
    api.addEventListener("executing", ({ detail }) => progress?.node !== detail && endProgress());
    api.addEventListener("execution_interrupted", () => progress && endProgress(`cancelled at ${progress.text}${progress.after_cancel}`));
    api.addEventListener("execution_error", () => progress && endProgress(`stopped at ${progress.text}`));
  },
  onNodeOutputsUpdated(outputs) { // of a run chosen in the history, or of a workflow whose tab was opened
    for (const [locator, output] of Object.entries(outputs)) draw(findByLocator(locator), output?.text);
  },
  afterConfigureGraph: restore,
});
