// What waits and what was answered, as a page believes it: what the server told last, and what was said since. No DOM.

export const EMPTY = { judged: 0, skipped: 0, waiting: 0, tickets: [], last: null, problems: 0, blind: false, result: null };

/** What a key means to somebody who compares `count` pictures: {pick}, {mark}, {say}, or null. */
export function keyMeaning({ key, ctrlKey, metaKey, altKey, shiftKey, repeat }, count) {
  const letter = key.length === 1 ? key.toLowerCase() : key;
  if (altKey || repeat) return null;
  if (ctrlKey || metaKey) return letter === "z" && !shiftKey ? { say: "undo" } : null;
  if (/^[1-9]$/.test(key)) return Number(key) <= count ? { pick: Number(key) - 1 } : null;
  if (count === 2 && (key === "ArrowLeft" || key === "ArrowRight")) return { pick: key === "ArrowLeft" ? 0 : 1 };
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -2, ArrowDown: 2 };
  if (count > 2 && key in steps) return { mark: steps[key] };
  const words = { t: "tie", 0: "tie", s: "skip", u: "undo", d: "draw", Enter: "marked", " ": "marked" };
  return Object.hasOwn(words, letter) ? { say: words[letter] } : null;
}

/** Where a mark goes in rows of two; it stays where there is nothing further. */
export function markAt(mark, step, count) {
  if (mark === null) return 0;
  const beside = step === -1 ? mark % 2 === 0 : step === 1 ? mark % 2 === 1 : false;
  return beside || mark + step < 0 || mark + step >= count ? mark : mark + step;
}

export class Desk {
  /** unsent: what an earlier page had said and could not send. */
  constructor(unsent = []) {
    this.told = EMPTY;
    this.unsent = unsent;
    this.sending = null;
    this.settled = 0; // answers of the server; an older look at the desk is not taken for a newer one
  }

  /** The desk with everything that was said, whether or not the server knows it yet. */
  get view() {
    let { judged, skipped, waiting, tickets, last, problems } = this.told;
    const count = (skip, by) => (skip ? (skipped += by) : (judged += by));
    for (const said of this.unsent) {
      if (said.choice === undefined) {
        if (last?.id !== said.id) continue;
        count(last.skipped, -1);
        waiting += 1;
        tickets = [last, ...tickets];
        last = null;
      } else if (tickets.some((ticket) => ticket.id === said.id)) {
        count(said.choice === "skip", 1);
        waiting -= 1;
        last = { ...tickets.find((ticket) => ticket.id === said.id), skipped: said.choice === "skip" };
        tickets = tickets.filter((ticket) => ticket.id !== said.id);
      }
    }
    // What is said of a blind test holds for what the server knows.
    const { blind, result } = this.told;
    return { judged, skipped, waiting, tickets, last, problems, current: tickets[0] ?? null, blind, result: this.unsent.length ? null : result };
  }

  /** Whether there is something to take back; one at a time, since only the server knows what was before it. */
  get canUndo() {
    return this.view.last !== null && !this.unsent.some((said) => said.choice === undefined);
  }

  /** Answer the ticket that is shown: a place, "tie" or "skip". False when there is none, or no such place. */
  choose(choice) {
    const ticket = this.view.current;
    if (!ticket || (typeof choice === "number" && !(choice >= 0 && choice < ticket.candidates.length))) return false;
    this.unsent.push({ id: ticket.id, choice });
    return true;
  }

  /** Take the last answer back; one that was not sent is forgotten. */
  undo() {
    if (!this.canUndo) return false;
    const newest = this.unsent.at(-1);
    if (newest && newest !== this.sending) this.unsent.pop();
    else this.unsent.push({ id: this.view.last.id });
    return true;
  }

  /** A look at the desk arrived that was asked for after `settled` answers. False when it is older than what is known. */
  hear(desk, settled) {
    if (settled !== this.settled) return false;
    this.told = { ...EMPTY, ...desk };
    return true;
  }

  /** The server took what was sent, or will never take it. desk: how things stand, where it said so. */
  settle(said, desk) {
    this.unsent = this.unsent.filter((other) => other !== said);
    this.sending = null;
    this.settled += 1;
    if (desk) this.told = { ...EMPTY, ...desk };
  }
}
