// Figures as people read them. What is not known is a dash.

export const UNKNOWN = "–";

type Figure = number | null | undefined;

const known = (value: Figure): value is number => typeof value === "number" && Number.isFinite(value);

// Memory in GiB and files in GB, as the rest of the library shows them.
export const memory = (bytes: Figure): string => scaled(bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
export const file = (bytes: Figure): string => scaled(bytes, 1000, ["B", "kB", "MB", "GB", "TB"]);

function scaled(bytes: Figure, step: number, units: string[]): string {
  if (!known(bytes)) return UNKNOWN;
  let value = Math.abs(bytes);
  let unit = 0;
  while (value >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  return `${bytes < 0 ? "−" : ""}${number(value)} ${units[unit]}`;
}

// Three digits that count.
export function number(value: Figure): string {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

// As many digits as a divergence needs.
export const small = (value: Figure): string =>
  !known(value) ? UNKNOWN : value === 0 ? "0" : value < 0.001 ? value.toExponential(1) : String(+value.toPrecision(3));

export const percent = (share: Figure): string =>
  known(share) ? `${number(Math.round(share * 1000) / 10)} %` : UNKNOWN;

// A short time, as of a token.
export function latency(seconds: Figure): string {
  if (!known(seconds)) return UNKNOWN;
  return seconds < 1 ? `${number(seconds * 1000)} ms` : `${number(seconds)} s`;
}

// A long one, as of a job.
export function duration(seconds: Figure): string {
  if (!known(seconds)) return UNKNOWN;
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  return `${hours} h ${Math.round((seconds % 3600) / 60)} min`;
}

export function minutes(range: [number, number] | null | undefined): string {
  if (!range) return UNKNOWN;
  const [least, most] = range.map((one) => duration(one * 60));
  return least === most ? least! : `${least} to ${most}`;
}

export function moment(iso: string | null): string {
  const time = iso ? new Date(iso) : null;
  if (!time || Number.isNaN(time.valueOf())) return UNKNOWN;
  const today = time.toDateString() === new Date().toDateString();
  const clock = time.toLocaleTimeString("en-GB");
  return today ? clock : `${time.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" })}, ${clock.slice(0, 5)}`;
}

// The last part of a path, which is what tells models apart.
export const short = (model: string): string => model.split("/").filter(Boolean).pop() ?? model;
