// Bars: how much there is of a whole. They are drawn in SVG, since a share of the width in a style attribute
// is what the page's security policy forbids.

interface GaugeProps {
  label: string;
  // From 0 to 1, or null where it is not known.
  share: number | null;
  text: string;
  // What it is for a screen reader: a level, or how far something has come.
  role?: "meter" | "progressbar";
}

export function Gauge({ label, share, text, role = "meter" }: GaugeProps) {
  const percent = share === null ? null : Math.round(Math.min(Math.max(share, 0), 1) * 1000) / 10;
  return (
    <svg
      class={`bar ${percent === null && role === "progressbar" ? "unknown" : ""} ${role === "meter" && (percent ?? 0) >= 90 ? "full" : ""}`}
      role={role}
      aria-label={label}
      aria-valuemin={0}
      aria-valuemax={100}
      aria-valuenow={percent ?? (role === "meter" ? 0 : undefined)}
      aria-valuetext={text}
    >
      <rect class="track" width="100%" height="100%" />
      {percent !== null && <rect class="tone-1" width={`${percent}%`} height="100%" />}
    </svg>
  );
}

export interface Part {
  name: string;
  amount: number;
  tone: number;
}

interface StackProps {
  label: string;
  parts: Part[];
  total: number;
  show: (amount: number) => string;
}

// What fills a whole, part by part, with a mark at its end where they are too much for it.
export function Stack({ label, parts, total, show }: StackProps) {
  const used = parts.reduce((sum, part) => sum + part.amount, 0);
  const scale = Math.max(used, total);
  const share = (amount: number) => `${((amount / scale) * 100).toFixed(2)}%`;
  const shown = parts.filter((part) => part.amount > 0);
  let start = 0;

  return (
    <div class="stack">
      <svg class="bar tall" role="img" aria-label={`${label}: ${shown.map((part) => `${part.name} ${show(part.amount)}`).join(", ")}, of ${show(total)}`}>
        <rect class="track" width="100%" height="100%" />
        {shown.map((part) => {
          const x = share(start);
          start += part.amount;
          return <rect key={part.name} class={`tone-${part.tone}`} x={x} width={share(part.amount)} height="100%" />;
        })}
        {used > total && <line class="limit" x1={share(total)} x2={share(total)} y1="0" y2="100%" />}
      </svg>
      <ul class="legends">
        {shown.map((part) => (
          <li class="legend" key={part.name}>
            <i class={`dot tone-${part.tone}`} />
            <span class="muted">{part.name}</span> <b>{show(part.amount)}</b>
          </li>
        ))}
        <li class="legend">
          <span class="muted">{used > total ? "too much by" : "left"}</span> <b>{show(Math.abs(total - used))}</b>
        </li>
      </ul>
    </div>
  );
}
