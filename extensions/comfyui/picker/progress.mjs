// How far somebody is, in words: to enough choices for a LoRA, or to the end of a blind test and its result. No DOM.
import { t } from "../locales/words.mjs";

const ENOUGH = 20; // choices for a first LoRA

/** desk: `Desk.view` -> {value, max} of a bar, and the text beside it. */
export function progress({ judged, waiting, skipped, blind, result }) {
  if (!blind) {
    const text = judged < ENOUGH ? t("{count} of about 20 choices for a first LoRA", { count: judged }) : t("{count} choices, enough for a first LoRA", { count: judged });
    return { value: judged, max: ENOUGH, text };
  }
  const value = judged + skipped, max = value + waiting || 1;
  if (!judged && !waiting && !skipped) return { value: 0, max: 1, text: "" };
  if (!result) return { value, max, text: t("{count} of {total}: which is which is said after the last", { count: value, total: value + waiting }) };
  const percent = (share) => Math.round(100 * share);
  const won = t("Yours against the base: {wins} of {of}", result);
  const sure = t("95 % interval {low} to {high} %", { low: percent(result.low), high: percent(result.high) });
  const ties = result.ties ? `, ${t("{ties} ties", result)}` : "";
  const clear = result.low > 0.5 ? t("yours is clearly better") : result.high < 0.5 ? t("the base is clearly better") : t("not clear, it may be chance");
  return { value, max, text: `${won}${ties} (${sure}): ${clear}` };
}
