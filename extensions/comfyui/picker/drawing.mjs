// Whether the next candidates should be drawn, so that a few always wait and nothing runs away. No DOM.

export const MOST = 16;

export class Drawing {
  constructor(keep = 2) {
    this.keep = keep;
    this.on = false;
    this.why = ""; // it stopped
    this.before = null; // tickets there were when a run was queued that has not ended
    this.barren = 0; // runs one after another that gave nothing new
  }

  start() {
    Object.assign(this, { on: true, why: "", before: null, barren: 0 });
  }

  stop(why = "") {
    this.on = false;
    this.why = why;
    this.before = null;
  }

  /** A run that this page had queued failed or was cancelled. */
  failed(why) {
    if (this.on) this.stop(why);
  }

  /**
   * Whether to queue the workflow now. queued: its runs that the server has not finished, looked at before the desk;
   * desk: `Desk.view`; left: prompts that are still to come, null where that is not known.
   */
  step({ queued, desk, left }) {
    if (!this.on || queued > 0) return false;
    const total = desk.judged + desk.skipped + desk.waiting;
    if (this.before !== null) this.barren = total > this.before ? 0 : this.barren + 1;
    // The first may repeat what an earlier page drew, before seeds change.
    if (this.barren > 1) {
      this.stop("The last two runs gave nothing new. Set the sampler's seed to randomize, or change the prompt.");
      return false;
    }
    this.before = null;
    if (desk.waiting >= this.keep) return false;
    if (left === 0) {
      this.stop("All prompts have been drawn. Set index of Next Prompt of a List to 0 for another round.");
      return false;
    }
    this.before = total;
    return true;
  }
}

/** Prompts that *Next Prompt of a List* still gives; null where it begins again or its list comes from another node. */
export function promptsLeft({ prompts, index, begin_again: again }) {
  if (typeof prompts !== "string" || typeof index !== "number" || again) return null;
  return Math.max(0, prompts.split(/\r\n|\r|\n/).filter((line) => line.trim()).length - index);
}

/** Runs in the server's queue that would add to a set. queue: the answer of /queue. */
export function queuedFor(queue, type, { set, by }) {
  const runs = [...(queue.queue_running ?? []), ...(queue.queue_pending ?? [])];
  return runs.filter(([, , prompt, , outputs]) =>
    Object.entries(prompt ?? {}).some(([id, { class_type, inputs }]) => {
      const same = (given, mine) => Array.isArray(given) || given === mine;
      return class_type === type && (outputs ?? [id]).includes(id) && same(inputs.name, set) && same(inputs.by, by);
    }),
  ).length;
}
