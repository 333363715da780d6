import type { ComponentChildren } from "preact";

interface Props {
  label: string;
  // Names of columns, those of figures with a `>` before it; the empty one is of buttons.
  columns: string[];
  class?: string;
  children: ComponentChildren;
}

// A table in a box of its own, which scrolls to the side on a narrow screen, also by keyboard.
export function Table({ label, columns, class: name, children }: Props) {
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={label}>
      <table class={name}>
        <thead>
          <tr>
            {columns.map((column) => (
              <Head key={column} column={column} />
            ))}
          </tr>
        </thead>
        {children}
      </table>
    </div>
  );
}

function Head({ column }: { column: string }) {
  if (column === "")
    return (
      <th scope="col">
        <span class="unseen">What to do</span>
      </th>
    );
  return (
    <th scope="col" class={column.startsWith(">") ? "right" : undefined}>
      {column.replace(/^>/, "")}
    </th>
  );
}
