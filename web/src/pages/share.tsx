import { useState } from "preact/hooks";
import { duration, file } from "../format";
import { Gauge } from "../parts/bars";
import { Dialog } from "../parts/dialog";
import { Check, TextField } from "../parts/fields";
import type { Upload } from "../sharing";
import { forget, share, sharing } from "../sharing";
import { useStore } from "../store";

export function ShareDialog({ model, onClose }: { model: string; onClose: () => void }) {
  const [repository, setRepository] = useState("");
  const [open, setOpen] = useState(false);
  const [token, setToken] = useState("");

  const begin = () => share(model, repository.trim(), { private: !open, ...(token.trim() && { hf_token: token.trim() }) });

  return (
    <Dialog title={`Share ${model} on the hub`} action="Share" onClose={onClose} onAction={begin}>
      <TextField
        label="Repository"
        required
        placeholder="owner/name"
        hint="It is made where there is none. The model goes there with a card that says what it was made of, and what it lost."
        value={repository}
        onChange={setRepository}
      />
      <Check label="Everybody may see it (a repository that is there stays as it is)" checked={open} onChange={setOpen} />
      <TextField
        label="Access token"
        type="password"
        placeholder="that of the server"
        hint="Of the hub, with the role write. It is kept nowhere."
        value={token}
        onChange={setToken}
      />
    </Dialog>
  );
}

// Those that are under way, and what came of the others.
export function Uploads() {
  const { uploads } = useStore(sharing);
  if (uploads.length === 0) return null;
  return (
    <ul class="cards" aria-label="Uploads">
      {uploads.map((upload) => (
        <li key={upload.id} class="card upload">
          <div class="head">
            <p>
              <b>{upload.model}</b> <span class="muted">to</span> {upload.url ? <Address url={upload.url} /> : upload.repository}
            </p>
            <div class="actions">
              {upload.url || upload.refused ? (
                <button type="button" aria-label={`Close what came of ${upload.model}`} onClick={() => forget(upload.id)}>
                  Close
                </button>
              ) : (
                <button type="button" aria-label={`Cancel the upload of ${upload.model}`} onClick={upload.stop}>
                  Cancel
                </button>
              )}
            </div>
          </div>
          {upload.refused && (
            <p class="note bad" role="alert">
              {upload.refused}
            </p>
          )}
          {!upload.url && !upload.refused && <Progress upload={upload} />}
        </li>
      ))}
    </ul>
  );
}

function Address({ url }: { url: string }) {
  return (
    <a href={url} target="_blank" rel="noopener noreferrer">
      {url}
    </a>
  );
}

function Progress({ upload: { model, progress } }: { upload: Upload }) {
  const sent = progress && progress.bytes > 0 ? progress : null;
  const text = sent
    ? [`${file(sent.bytes)} of ${file(sent.total_bytes)}`, sent.seconds_left !== null && `${duration(sent.seconds_left)} left`].filter(Boolean).join(" · ")
    : "reads the files";
  return (
    <div class="loading">
      <Gauge role="progressbar" label={`Upload of ${model}`} share={sent && sent.bytes / sent.total_bytes} text={text} />
      <p class="muted">{text}</p>
    </div>
  );
}
