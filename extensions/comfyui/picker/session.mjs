// What somebody who picks from a set says to the server; what cannot be sent is kept over a reload. No DOM.
import { Desk } from "./desk.mjs";
import { Mail } from "./mail.mjs";

export class Session {
  /** place: {set, by}; request(path, options): a fetch of this server; changed(note): show the desk again. */
  constructor({ set, by }, request, changed) {
    Object.assign(this, { by, request, path: `/retort/picker/${encodeURIComponent(set)}` });
    const drawer = Session.drawer({ set, by });
    this.desk = new Desk(JSON.parse(sessionStorage.getItem(drawer) ?? "[]"));
    this.mail = new Mail(this.desk, {
      post: ({ id, choice }) => this.ask(choice === undefined ? "take_back" : "answer", { id, choice }),
      keep: (unsent) => sessionStorage.setItem(drawer, JSON.stringify(unsent)),
      changed,
      later: (seconds, what) => setTimeout(what, 1000 * seconds),
    });
    if (this.desk.unsent.length) this.mail.send();
  }

  /** Where a page keeps what it could not send. */
  static drawer({ set, by }) {
    return `retort.picker.unsent ${JSON.stringify([set, by])}`;
  }

  async ask(what, body) {
    const sent = body && { method: "POST", body: JSON.stringify(body) };
    const answer = await this.request(`${this.path}/${what}?by=${encodeURIComponent(this.by)}`, {
      ...sent,
      cache: "no-store",
      headers: sent && { "Content-Type": "application/json" },
    });
    return { status: answer.status, body: await answer.json().catch(() => null) };
  }
}
