// Requests to our own routes; a refusal becomes an Error that says why.
import { api } from "../../../scripts/api.js";

async function answered(response) {
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(answer.error ?? `HTTP ${response.status}`), { status: response.status, answer });
  return answer;
}

function url(parts) {
  return `/retort/${parts.map(encodeURIComponent).join("/")}`;
}

/** GET /retort/part/part?query as JSON. */
export async function ask(parts, query = {}) {
  const tail = new URLSearchParams(query).toString();
  return answered(await api.fetchApi(url(parts) + (tail ? `?${tail}` : "")));
}

/** POST a JSON object. */
export async function tell(parts, body) {
  const headers = { "Content-Type": "application/json" };
  return answered(await api.fetchApi(url(parts), { method: "POST", headers, body: JSON.stringify(body) }));
}

/** Where a picture of ours is, for an <img>. */
export function address(parts) {
  return api.apiURL(url(parts));
}

/** End what ComfyUI executes, as its own button does. */
export async function interrupt() {
  await api.interrupt(null);
}

/** Where a run's preview of a step is. */
export function previewOf(run, step) {
  return address(["runs", run, "previews", `step_${String(step).padStart(7, "0")}.png`]);
}
