defmodule VLLM.Job do
  @fields [
    id:
      "names the job: `\"20261128T041233120457-4fj2kq5a\"`; all functions take it, as well as the job itself",
    kind: "`:quantize` or `:finetune`",
    name: "the name under which its outputs are registered",
    source: "the model that it is made of: a hub id, a registered name or a folder",
    options: "what was asked for: a map with string keys, without secrets",
    state: "see below",
    waiting_for: "what a queued job waits for, as a text; nil where nothing is to be said",
    outputs: "a list of `VLLM.Job.Output`; empty until it is known what they will be called",
    progress: "the last `VLLM.Job.Progress`",
    error: "the `VLLM.Error` of one that failed, was cancelled or interrupted",
    made_at: "when it was asked for, a `DateTime`",
    started_at: "when it began; nil while it waits for others",
    ended_at: "when it ended; nil before"
  ]

  @moduledoc """
  Makes models, as jobs that are supervised: quantizes them, and trains adapters.

      {:ok, job} =
        VLLM.Job.quantize("meta-llama/Llama-2-7b-hf",
          name: "llama",
          to: [gguf: ["Q4_K_M", "Q8_0"], awq: [], gptq: [bits: 4, group_size: 128]]
        )

      {:ok, outputs} = VLLM.Job.await(job)
      llm = VLLM.llm!("llama:Q4_K_M")

  A job outlives the process that asked for it. It works in processes of the operating system, one for
  each step, which stand back behind engines; nothing is left of them, however the job ends. What it
  has made is loaded and compared with its source, and only then gets its place and its name, at once
  and as a whole.

  ## States

  | state | meaning |
  | --- | --- |
  | `:queued` | waits for other jobs (`config :ex_vllm, max_jobs: 1`), or for memory that others hold |
  | `:downloading` | the source is fetched from the hub |
  | `:preparing` | options, source, memory and disk are looked at |
  | `:quantizing` | an output is made |
  | `:training` | an adapter is trained |
  | `:verifying` | an output is loaded, and compared with the source |
  | `:done` | all outputs are there |
  | `:failed` | some are not; `error` says why. Those whose state is `:done` are there |
  | `:cancelled` | by `cancel/1` |
  | `:interrupted` | the application that ran it ended, or was killed |

  After the last three `retry/2` goes on at the output that was not finished.

  ## Where they are kept

  In a folder of the user (`config :ex_vllm, data_dir: "/srv/models"`): `jobs/` has the jobs with their
  logs, `models/` what came of them. Jobs survive the end of the application and of the machine; none
  starts again by itself. Several applications may share the folder: each runs the jobs that were
  asked of it, and sees those of the others.

  ## A job

  #{VLLM.Fields.docs(@fields)}
  """

  import VLLM.Error, only: [bang!: 1]

  alias VLLM.{Data, Error, Options, Plot, Terminal, Tools}
  alias VLLM.Engine.Table

  alias VLLM.Job.{
    Estimate,
    Finetune,
    Losses,
    Output,
    Progress,
    Quantize,
    Queue,
    Record,
    Settings,
    Steps,
    Store
  }

  @enforce_keys [:id, :kind, :name, :source, :state]
  defstruct [
    :id,
    :kind,
    :name,
    :source,
    :state,
    :waiting_for,
    :progress,
    :error,
    :made_at,
    :started_at,
    :ended_at,
    options: %{},
    outputs: []
  ]

  @type state ::
          :queued
          | :downloading
          | :preparing
          | :quantizing
          | :training
          | :verifying
          | :done
          | :failed
          | :cancelled
          | :interrupted

  @type t :: %__MODULE__{
          id: String.t(),
          kind: :quantize | :finetune,
          name: String.t(),
          source: String.t(),
          options: %{String.t() => term()},
          state: state(),
          waiting_for: String.t() | nil,
          outputs: [Output.t()],
          progress: Progress.t() | nil,
          error: Error.t() | nil,
          made_at: DateTime.t() | nil,
          started_at: DateTime.t() | nil,
          ended_at: DateTime.t() | nil
        }

  @typedoc "A job, or its id."
  @type id :: t() | String.t()

  # How often a job of another application is looked at that is to end, and for how long, in ms.
  @look 200
  @end_timeout 60_000

  @doc """
  Quantizes a model: starts a job that makes it in other formats, and returns the job at once.

      {:ok, job} = VLLM.Job.quantize("Qwen/Qwen2.5-0.5B-Instruct", to: ["gguf:Q4_K_M", :awq])

  `model` is a plain model in safetensors: a hub id, which is downloaded, or a folder. What is
  wrong with the formats or their options is found before anything is downloaded, and what does not
  suit this model before anything is made. An output that fails does not keep the others from being
  made. `await/2` waits for all, `subscribe/1` tells how far they are.

  ## Options

  #{Options.docs(Options.quantize())}

  ## Errors

  `:invalid_option`; `:name_taken` where a job that has not ended makes models of this name;
  `:not_allowed`; `:disk_full` and `:cache_not_writable`. All others are the job's own, see `await/2`.
  """
  @spec quantize(String.t(), keyword() | map()) :: {:ok, t()} | {:error, Error.t()}
  def quantize(model, options) do
    with {:ok, known} <- Options.only(options, Options.quantize()),
         {:ok, record} <- Quantize.new(model, known),
         do: submit(record, known)
  end

  @doc "Like `quantize/2`, but returns the job or raises `VLLM.Error`."
  @spec quantize!(String.t(), keyword() | map()) :: t()
  def quantize!(model, options), do: bang!(quantize(model, options))

  @doc """
  Fine-tunes a model: starts a job that trains a LoRA adapter over it, and returns the job at once.

      {:ok, job} =
        VLLM.Job.finetune("Qwen/Qwen2.5-0.5B-Instruct", "/data/tickets.jsonl",
          to: "tickets",
          load_in_4bit: true,
          epochs: 3,
          held_out: 0.05
        )

      {:ok, [adapter]} = VLLM.Job.await(job)
      VLLM.generate!(llm, "The printer is on fire.", lora_request: "tickets")

  `data` is a list, or the path of a `.jsonl`, `.json` or `.txt` file or of a folder of such. A record
  has `prompt` and `completion` (also as a tuple of the two), `messages`, which go through the
  model's chat template, or `text`. Only completions and the assistant's messages are learned, and
  texts whole. Bad data is told with its file and line. guides/finetuning.md has all of it: over which
  formats there is training, replay, and what the figures of the output mean.

  Needs `mix vllm.setup --with finetune`, and for `load_in_4bit` and `load_in_8bit`
  `--with bitsandbytes` too.

  ## Options

  #{Options.docs(Options.finetune())}

  All others are those of the training: of peft's `LoraConfig` (`r: 16`, `lora_alpha: 32`,
  `target_modules: "all-linear"`, `lora_dropout`, …), of transformers' `TrainingArguments`
  (`num_train_epochs: 3`, also as `epochs`, `learning_rate: 2.0e-4`,
  `per_device_train_batch_size: 8`, `seed: 42`, `save_steps`, …) and `BitsAndBytesConfig`
  (`load_in_4bit`, in NF4 with double quantization, `load_in_8bit`), and:

    * `:max_length` - tokens of an example; what is longer is cut. By default 1024, or what the model has
    * `:held_out` - a share of the data, or data of its own, on which the loss is measured. By default
      0.05 of 100 records and more
    * `:replay` - data that is trained on too, so that the model keeps what it says there; records with
      a `prompt` only are answered by the base itself before
    * `:probes` - prompts that are answered before and after, to see what the base has forgotten
    * `:early_stopping_patience` - evaluations without a better loss after which the training ends,
      with the best state
    * `:merge` - make a merged model, too; false by default

  ## Errors

  `:invalid_option`; `:name_taken` where a job that has not ended makes models of this name;
  `:not_allowed`; `:disk_full` and `:cache_not_writable`. All others are the job's own, see `await/2`.
  """
  @spec finetune(String.t(), String.t() | [term()], keyword() | map()) ::
          {:ok, t()} | {:error, Error.t()}
  def finetune(model, data, options) do
    with {:ok, record, known} <- training(model, data, options), do: submit(record, known)
  end

  @doc "Like `finetune/3`, but returns the job or raises `VLLM.Error`."
  @spec finetune!(String.t(), String.t() | [term()], keyword() | map()) :: t()
  def finetune!(model, data, options), do: bang!(finetune(model, data, options))

  defp training(model, data, options) do
    own = Enum.map(Options.names(Options.finetune()), &Atom.to_string/1)

    with {:ok, options} <- Options.to_map(options),
         {given, training} = Map.split(options, own),
         {:ok, known} <- Options.only(given, Options.finetune()),
         {:ok, record} <- Finetune.new(model, data, Map.put(known, :training, training)),
         do: {:ok, record, known}
  end

  @doc """
  What `quantize/2` would take with these options: disk, memory and minutes, as a
  `VLLM.Job.Estimate`. Nothing is downloaded and nothing made; of a model on the hub the headers of
  its files are read.

      {:ok, estimate} = VLLM.Job.estimate("Qwen/Qwen2.5-0.5B-Instruct", to: ["gguf:Q4_K_M", :awq])
      for output <- estimate.outputs, do: {output.label, output.bytes, output.memory}

  Formats and options are checked as `quantize/2` does, by the libraries that quantize. What `finetune/3`
  would take is told by `estimate/3`.

  ## Errors

  `:invalid_option`, `:unsupported` for a model that is quantized already, `:model_not_found` and
  others of the source, `:quantize_not_installed`.
  """
  @spec estimate(String.t(), keyword() | map()) :: {:ok, Estimate.t()} | {:error, Error.t()}
  def estimate(model, options) do
    with {:ok, known} <- Options.only(options, Options.quantize()),
         {:ok, record} <- Quantize.new(model, known),
         do: Quantize.estimate(record, Settings.new(record, known).())
  end

  @doc "Like `estimate/2`, but returns the estimate or raises `VLLM.Error`."
  @spec estimate!(String.t(), keyword() | map()) :: Estimate.t()
  def estimate!(model, options), do: bang!(estimate(model, options))

  @doc """
  What `finetune/3` would take with the same arguments, as a `VLLM.Job.Estimate`. Nothing is trained.

      {:ok, estimate} =
        VLLM.Job.estimate("Qwen/Qwen2.5-0.5B-Instruct", "/data/tickets.jsonl", to: "tickets", epochs: 3)

      {estimate.memory, estimate.minutes}

  Data and options are checked as `finetune/3` does. The tokenizer of the model counts the tokens of the
  data; of a model that is still on the hub they are guessed from its bytes.

  ## Errors

  `:invalid_option`, `:model_not_found` and others of the source, those with which a training over this
  model is refused (`:unsupported_quantization`, `:unsupported_model`), and `:vllm_not_installed` where
  what trains is not installed.
  """
  @spec estimate(String.t(), String.t() | [term()], keyword() | map()) ::
          {:ok, Estimate.t()} | {:error, Error.t()}
  def estimate(model, data, options) do
    with {:ok, record, known} <- training(model, data, options),
         do: Finetune.estimate(record, Settings.new(record, known).())
  end

  @doc "Like `estimate/3`, but returns the estimate or raises `VLLM.Error`."
  @spec estimate!(String.t(), String.t() | [term()], keyword() | map()) :: Estimate.t()
  def estimate!(model, data, options), do: bang!(estimate(model, data, options))

  @doc """
  What `quantize/2` can make here, as the libraries that quantize declare it: a list of maps, one for each
  format.

    * `:format` - the format, by vLLM's name of it: `"gguf"`, `"gptq"`, …
    * `:types` - words that may stand for its options: `"Q4_K_M"` in `"gguf:Q4_K_M"`
    * `:options` - a list of maps, each with the `:name` of an option, its `:type` (Python's, nil for any), its
      `:default`, the only values that are `:allowed` (empty for any), and `:doc`
    * `:refused` - why nothing can be made in this format here; nil where it can

  The libraries are imported for it, which takes some seconds.

      {:ok, formats} = VLLM.Job.formats()
      for %{refused: nil} = format <- formats, do: {format.format, format.types}

  ## Options

  #{Options.docs(Options.formats())}

  The error is `:quantize_not_installed` where there is no environment that quantizes.
  """
  @spec formats(keyword() | map()) :: {:ok, [map()]} | {:error, Error.t()}
  def formats(options \\ []) do
    with {:ok, known} <- Options.only(options, Options.formats()), do: Quantize.formats(known)
  end

  @doc "Like `formats/1`, but returns the list or raises `VLLM.Error`."
  @spec formats!(keyword() | map()) :: [map()]
  def formats!(options \\ []), do: bang!(formats(options))

  @doc """
  A picture of the losses of a fine-tuning over its steps, as the content of its file; of one that is done.

      File.write!("losses.svg", VLLM.Job.plot!(job))

  ## Options

  #{Options.docs(Options.plot())}

  The error is `:invalid_option` where the job has no losses, `:job_not_found` where there is none, and
  `:vllm_not_installed` where matplotlib is missing (`mix vllm.setup --with matplotlib`).
  """
  @spec plot(id(), keyword() | map()) :: {:ok, binary()} | {:error, Error.t()}
  def plot(job, options \\ []) do
    with {:ok, job} <- get(job) do
      case for %{figures: %{"losses" => [_ | _]} = figures} <- job.outputs, do: figures do
        [figures | _] ->
          title = "Loss of #{job.name} over the steps of its training"
          Plot.draw(title, Losses.panels(figures), options)

        [] ->
          {:error, no_losses(job.id)}
      end
    end
  end

  @doc "Like `plot/2`, but returns the picture or raises `VLLM.Error`."
  @spec plot!(id(), keyword() | map()) :: binary()
  def plot!(job, options \\ []), do: bang!(plot(job, options))

  defp no_losses(id) do
    message = "The job #{id} has no losses: only a fine-tuning that is done has some."
    Error.new(:invalid_option, message, %{"job" => id})
  end

  defp submit(record, secrets) do
    with {:ok, record} <- Queue.submit(record, Settings.new(record, secrets)),
         do: {:ok, of(record)}
  end

  defp of(%Record{} = record) do
    fields = Map.take(record, Keyword.keys(@fields))
    struct!(__MODULE__, %{fields | progress: Record.progress(record)})
  end

  @doc """
  All jobs, those first that were asked for last. It reads the disk of this machine only, and cannot
  fail, so that it returns the list as it is: jobs whose files cannot be read are left out.

      for job <- VLLM.Job.list(), do: {job.name, job.state}
  """
  @spec list() :: [t()]
  def list, do: Queue.list() |> Enum.reverse() |> Enum.map(&of/1)

  @doc "A job as it is now. The error is `:job_not_found`."
  @spec get(id()) :: {:ok, t()} | {:error, Error.t()}
  def get(job) do
    with {:ok, record} <- job |> id() |> Queue.get(), do: {:ok, of(record)}
  end

  @doc "Like `get/1`, but returns the job or raises `VLLM.Error`."
  @spec get!(id()) :: t()
  def get!(job), do: bang!(get(job))

  @doc """
  Has the calling process told how far a job is: `{ref, %VLLM.Job.Progress{}}` messages, the first at
  once, and a last one whose state is `:done`, `:failed`, `:cancelled` or `:interrupted`.

      {:ok, ref} = VLLM.Job.subscribe(job)

      receive do
        {^ref, %VLLM.Job.Progress{} = progress} -> VLLM.Job.Progress.describe(progress)
      end

  The error is `:job_not_found`. It ends with the calling process, or by `unsubscribe/1`.
  """
  @spec subscribe(id()) :: {:ok, reference()} | {:error, Error.t()}
  def subscribe(job), do: job |> id() |> Queue.subscribe(self())

  @doc "Like `subscribe/1`, but returns the reference or raises `VLLM.Error`."
  @spec subscribe!(id()) :: reference()
  def subscribe!(job), do: bang!(subscribe(job))

  @doc "Ends a subscription; messages that have come are removed."
  @spec unsubscribe(reference()) :: :ok
  def unsubscribe(ref) do
    _ = Queue.unsubscribe(ref)
    flush(ref)
  end

  defp flush(ref) do
    receive do
      {^ref, _progress} -> flush(ref)
    after
      0 -> :ok
    end
  end

  @doc """
  Waits until a job has ended, and returns its outputs.

  In iex it shows a bar meanwhile.

  ## Options

  #{Options.docs(Options.await())}

  ## Errors

  That with which the job has failed, as `get/1` has it: `:unsupported` and `:invalid_option` of a
  format that cannot be made, `:model_not_found` and others of the source, `:quantize_not_installed`,
  `:disk_full`, `:out_of_memory`, `:not_verified`, `:source_changed`, `:name_taken` (before anything is
  downloaded or made) where an alias or another model has the name, `:step_died`, …; `:aborted` where it
  was cancelled, `:job_interrupted`; and of the waiting itself `:timeout` and `:job_not_found`.
  """
  @spec await(id(), keyword() | map()) :: {:ok, [Output.t()]} | {:error, Error.t()}
  def await(job, options \\ []) do
    with {:ok, known} <- Options.only(options, Options.await()),
         {:ok, ref} <- subscribe(job) do
      # It tells nothing any more if it ends.
      queue = Process.monitor(Queue)

      alarm =
        if known.timeout != :infinity, do: Process.send_after(self(), {ref, :late}, known.timeout)

      try do
        Terminal.line(known.progress, &await(ref, queue, &1))
      after
        if alarm, do: Process.cancel_timer(alarm)
        Process.demonitor(queue, [:flush])
        unsubscribe(ref)
      end
      |> outcome(job, known.timeout)
    end
  end

  defp await(ref, queue, show) do
    receive do
      {^ref, :late} ->
        :late

      {^ref, progress} ->
        show.(fn -> Progress.bar(progress, Terminal.columns() || 80) end)
        if ended?(progress.state), do: progress, else: await(ref, queue, show)

      {:DOWN, ^queue, :process, _, _} ->
        :stopped
    end
  end

  defp ended?(state), do: state in [:done, :failed, :cancelled, :interrupted]

  defp outcome(%Progress{state: :done}, job, _timeout) do
    with {:ok, %{outputs: outputs}} <- get(job), do: {:ok, outputs}
  end

  defp outcome(%Progress{error: error}, _job, _timeout), do: {:error, error}

  defp outcome(:late, job, timeout) do
    message =
      "The job has not ended within #{timeout / 1000} seconds. It goes on: wait for it once more, or " <>
        "`VLLM.Job.cancel(#{inspect(id(job))})`."

    {:error, Error.new(:timeout, message, %{"option" => "timeout", "timeout" => timeout})}
  end

  # Its record says what became of it.
  defp outcome(:stopped, job, _timeout) do
    with {:ok, record} <- job |> id() |> Store.read() do
      if Record.ended?(record),
        do: outcome(Record.progress(record), job, nil),
        else: {:error, Record.interrupted(record).error}
    end
  end

  @doc "Like `await/2`, but returns the outputs or raises `VLLM.Error`."
  @spec await!(id(), keyword() | map()) :: [Output.t()]
  def await!(job, options \\ []), do: bang!(await(job, options))

  @doc """
  Ends a job, in whatever state it is, and returns when nothing of it runs any more.

  Its processes are killed, and what they were at is removed; outputs that are finished stay. A job
  that has ended stays as it is. Errors are `:job_not_found`, and `:timeout` where another
  application runs the job and has not ended it within a minute.
  """
  @spec cancel(id()) :: :ok | {:error, Error.t()}
  def cancel(job) do
    with :asked <- job |> id() |> Queue.cancel(), do: await_end(id(job), @end_timeout)
  end

  defp await_end(id, left) do
    case Store.read(id) do
      {:ok, record} ->
        cond do
          Record.ended?(record) -> :ok
          left <= 0 -> {:error, not_cancelled(id)}
          true -> await_end_later(id, left)
        end

      # Somebody has deleted it.
      {:error, _gone} ->
        :ok
    end
  end

  # The other application tells it by the disk only.
  defp await_end_later(id, left) do
    receive do
    after
      @look -> await_end(id, left - @look)
    end
  end

  defp not_cancelled(id) do
    message =
      "The application that runs the job #{id} was asked to end it, and has not within " <>
        "#{div(@end_timeout, 1000)} seconds. Is it busy, or stopped? `mix vllm.jobs` shows the job."

    Error.new(:timeout, message, %{"job" => id})
  end

  @doc "Like `cancel/1`, but raises `VLLM.Error`."
  @spec cancel!(id()) :: :ok
  def cancel!(job), do: bang!(cancel(job))

  @doc """
  Starts a job again that failed, was cancelled or interrupted: it goes on at the output that was not
  finished. Those that are finished stay as they are.

  What was given with `hf_token:` and `env:` is on no disk: where another application, or one that was
  started again, retries a job, it is to be given once more.

  ## Options

  #{Options.docs(Options.retry())}

  Errors are `:job_not_found`; `:job_running`; `:unsupported` where all is done; `:name_taken` where
  another job makes models of this name meanwhile.
  """
  @spec retry(id(), keyword() | map()) :: {:ok, t()} | {:error, Error.t()}
  def retry(job, options \\ []) do
    with {:ok, secrets} <- Options.only(options, Options.retry()),
         given? = secrets.hf_token != nil or secrets.env != %{},
         {:ok, record} <- job |> id() |> Queue.retry(&Settings.new(&1, secrets), given?),
         do: {:ok, of(record)}
  end

  @doc "Like `retry/2`, but returns the job or raises `VLLM.Error`."
  @spec retry!(id(), keyword() | map()) :: t()
  def retry!(job, options \\ []), do: bang!(retry(job, options))

  @doc """
  Deletes a job that has ended, with its log.

  ## Options

  #{Options.docs(Options.delete_job())}

  Errors are `:job_not_found`; `:job_running`: cancel it first; and `:in_use` where an engine of this
  BEAM serves an output that is to be deleted: the job stays, too.
  """
  @spec delete(id(), keyword() | map()) :: :ok | {:error, Error.t()}
  def delete(job, options \\ []) do
    with {:ok, known} <- Options.only(options, Options.delete_job()),
         {:ok, record} <- job |> id() |> Queue.get(),
         :ok <- delete_outputs(record, known.outputs),
         do: Queue.delete(record.id)
  end

  defp delete_outputs(_record, false), do: :ok

  defp delete_outputs(record, true) do
    if Record.ended?(record) do
      Enum.reduce_while(record.outputs, :ok, fn output, :ok ->
        case delete_output(record, output) do
          :ok -> {:cont, :ok}
          {:error, error} -> {:halt, {:error, error}}
        end
      end)
    else
      # The queue says that it runs.
      :ok
    end
  end

  # What has its place or its name by now may be another's. A folder that somebody has removed has
  # left its name behind.
  defp delete_output(record, output) do
    place = Data.model(record.name, output.label)

    if Steps.published?(record, output) or (output.state == :done and not File.exists?(place)),
      do: delete_published(record, output, place),
      else: :ok
  end

  # It may have its name before the record says so.
  defp delete_published(record, output, place) do
    name = Queue.kind(record).name(record, output)
    params = %{"name" => name, "path" => place, "in_use" => Table.models()}

    case Tools.ask("unregister", params) do
      {:ok, _freed} -> :ok
      {:error, %Error{reason: :model_not_found}} -> delete_nameless(output, place)
      {:error, error} -> {:error, error}
    end
  end

  # Its name was taken from it, and another one may have its files.
  defp delete_nameless(%Output{state: :done}, _place), do: :ok

  defp delete_nameless(_output, place) do
    _ = File.rm_rf(place)
    :ok
  end

  @doc "Like `delete/2`, but raises `VLLM.Error`."
  @spec delete!(id(), keyword() | map()) :: :ok
  def delete!(job, options \\ []), do: bang!(delete(job, options))

  @doc """
  What the processes of a job have printed, as a list of lines, oldest first; each step begins with a line
  of its own (`== quantize Q4_K_M`). Of very long logs the beginning is dropped.
  """
  @spec logs(id()) :: {:ok, [String.t()]} | {:error, Error.t()}
  def logs(job) do
    with {:ok, record} <- job |> id() |> Queue.get(), do: {:ok, Store.read_log(record.id)}
  end

  @doc "Like `logs/1`, but returns the lines or raises `VLLM.Error`."
  @spec logs!(id()) :: [String.t()]
  def logs!(job), do: bang!(logs(job))

  defp id(%__MODULE__{id: id}), do: id
  defp id(id), do: id
end
