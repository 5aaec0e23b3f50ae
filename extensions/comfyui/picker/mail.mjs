// Sends what was said, one after another, until the server has it; what cannot be sent is kept and tried again. No DOM.

const WAITS = [1, 2, 4, 8, 15]; // seconds

export class Mail {
  /**
   * post(said) -> {status, body}, and throws where nobody answers. keep(unsent): writes down what a new page would
   * have to send. changed(notice): shows the desk again. later(seconds, what): a timer.
   */
  constructor(desk, { post, keep, changed, later }) {
    Object.assign(this, { desk, post, keep, changed, later, failures: 0, running: false });
  }

  /** Send everything; called again whenever something was said. */
  async send() {
    this.keep(this.desk.unsent);
    if (this.running) return;
    this.running = true;
    try {
      while (this.desk.unsent.length && !this.stopped) {
        const said = (this.desk.sending = this.desk.unsent[0]);
        const { status, body } = await this.post(said).catch((error) => ({ status: 0, body: { error: error.message } }));
        if (status === 0 || status >= 500) {
          this.desk.sending = null;
          const seconds = WAITS[Math.min(this.failures++, WAITS.length - 1)];
          this.changed(`Not saved yet (${body.error || status}): trying again in ${seconds} s. Your choices are kept.`);
          this.later(seconds, () => this.send());
          return;
        }
        this.failures = 0;
        const known = body && typeof body.waiting === "number" ? body : null;
        this.desk.settle(said, known);
        this.keep(this.desk.unsent);
        this.changed(status === 200 ? "" : refused(status, body));
      }
    } finally {
      this.running = false;
    }
  }

  /** The node is gone: nothing more is sent from here; what is left is sent by the next page. */
  stop() {
    this.stopped = true;
  }
}

function refused(status, body) {
  const why = body?.error || `ComfyUI answered ${status}`;
  return status === 409 ? `Somebody was faster, so this choice was left out: ${why}.` : `This choice was refused: ${why}`;
}
