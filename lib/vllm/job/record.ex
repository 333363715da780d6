defmodule VLLM.Job.Record do
  @moduledoc false
  # All that is known of a job: what is kept on the disk, and, in `memo`, what
  # its kind has found out since it began, which a retry finds out anew.
  # (VLLM.Job is what users see of it.)
  #
  # On the disk it is a map in MessagePack. What is read there is not trusted: a
  # file may be damaged, or of another version.

  alias VLLM.Bridge.MessagePack
  alias VLLM.Error
  alias VLLM.Job.{Output, Progress, Step}

  @enforce_keys [:id, :kind, :name, :source]
  defstruct [
    :id,
    :kind,
    :name,
    :source,
    :path,
    :fingerprint,
    :owner,
    :error,
    :progress,
    :waiting_for,
    :made_at,
    :started_at,
    :ended_at,
    options: %{},
    outputs: [],
    state: :queued,
    memo: %{}
  ]

  @type t :: %__MODULE__{
          id: String.t(),
          kind: :quantize | :finetune,
          name: String.t(),
          source: String.t(),
          path: Path.t() | nil,
          fingerprint: String.t() | nil,
          owner: map() | nil,
          error: Error.t() | nil,
          progress: Progress.t() | nil,
          waiting_for: String.t() | nil,
          made_at: DateTime.t() | nil,
          started_at: DateTime.t() | nil,
          ended_at: DateTime.t() | nil,
          options: %{String.t() => term()},
          outputs: [Output.t()],
          state: atom(),
          memo: map()
        }

  # Of what is on the disk.
  @version 1

  @kinds [:quantize, :finetune]
  @ends [:done, :failed, :cancelled, :interrupted]
  @states [:queued, :downloading, :preparing, :quantizing, :training, :verifying] ++ @ends
  @output_states [:waiting, :quantizing, :training, :verifying, :registering, :done, :failed]

  @plain [:id, :name, :source, :path, :fingerprint, :owner, :waiting_for, :options]
  @times [:made_at, :started_at, :ended_at]
  @structured [:__struct__, :state, :error]
  @output_plain Map.keys(Output.__struct__()) -- @structured
  @progress_plain Map.keys(Progress.__struct__()) -- @structured

  @doc "The kinds of jobs."
  @spec kinds() :: [atom()]
  def kinds, do: @kinds

  @doc "The states of jobs: those that have not ended, and those that have."
  @spec states() :: {[atom()], [atom()]}
  def states, do: {@states -- @ends, @ends}

  @doc "A new id; later ones sort after earlier ones."
  @spec new_id() :: String.t()
  def new_id do
    time = Calendar.strftime(DateTime.utc_now(), "%Y%m%dT%H%M%S%f")
    time <> "-" <> Base.encode32(:rand.bytes(5), case: :lower)
  end

  @doc "Whether a text can be an id, and so the name of a folder."
  @spec id?(term()) :: boolean()
  def id?(id), do: is_binary(id) and id =~ ~r/\A[0-9A-Za-z][0-9A-Za-z-]{0,63}\z/

  @doc "Whether the job has ended."
  @spec ended?(t()) :: boolean()
  def ended?(%__MODULE__{state: state}), do: state in @ends

  @doc "Changes the output of a label."
  @spec update_output(t(), String.t(), (Output.t() -> Output.t())) :: t()
  def update_output(%__MODULE__{outputs: outputs} = record, label, fun) do
    outputs = for output <- outputs, do: if(output.label == label, do: fun.(output), else: output)
    %{record | outputs: outputs}
  end

  @doc "The record of a job that was cut off: by the end of its BEAM, or of the process that ran it."
  @spec interrupted(t()) :: t()
  def interrupted(%__MODULE__{} = record) do
    message =
      "The job was interrupted in the state #{record.state}: the application that ran it ended. " <>
        "`VLLM.Job.retry(#{inspect(record.id)})` goes on with it."

    ended(record, :interrupted, Error.new(:job_interrupted, message, %{"job" => record.id}))
  end

  @doc "The record of a job that somebody has cancelled."
  @spec cancelled(t()) :: t()
  def cancelled(record) do
    message =
      "The job was cancelled. `VLLM.Job.retry(#{inspect(record.id)})` goes on with what is not finished."

    ended(record, :cancelled, Error.new(:aborted, message, %{"job" => record.id}))
  end

  @doc "The record of a job that has ended in this state."
  @spec ended(t(), atom(), Error.t() | nil) :: t()
  def ended(record, state, error) when state in @ends do
    %{
      record
      | state: state,
        error: error,
        waiting_for: nil,
        ended_at: now(),
        memo: %{},
        progress: %Progress{progress(record) | state: state, waiting_for: nil, error: nil}
    }
  end

  @doc "How far the job is, as far as it was told."
  @spec progress(t()) :: Progress.t()
  def progress(%__MODULE__{progress: nil} = record),
    do: progress(%{record | progress: %Progress{job: record.id, state: record.state}})

  def progress(%__MODULE__{progress: progress} = record) do
    %Progress{
      progress
      | state: record.state,
        waiting_for: record.waiting_for,
        error: record.error
    }
  end

  @doc "How far it is with a step, of which `wire` tells."
  @spec progress(t(), Step.t(), map()) :: Progress.t()
  def progress(%__MODULE__{outputs: outputs} = record, step, wire) do
    number = Enum.find_index(outputs, &(&1.label == step.output))

    Progress.put(
      %Progress{
        job: record.id,
        state: record.state,
        output: step.output,
        output_number: number && number + 1,
        outputs: if(outputs != [], do: length(outputs)),
        phase: Atom.to_string(step.name)
      },
      wire
    )
  end

  @doc "Now, in seconds."
  @spec now() :: DateTime.t()
  def now, do: DateTime.truncate(DateTime.utc_now(), :second)

  @doc "The bytes of a job's file."
  @spec encode(t()) :: iodata()
  def encode(%__MODULE__{} = record) do
    map =
      record
      |> Map.take(@plain)
      |> Map.merge(Map.new(@times, &{&1, time_to_wire(Map.fetch!(record, &1))}))
      |> Map.merge(%{
        version: @version,
        kind: record.kind,
        state: record.state,
        error: error_to_wire(record.error),
        progress: progress_to_wire(record.progress),
        outputs: Enum.map(record.outputs, &output_to_wire/1)
      })

    MessagePack.encode!(map)
  end

  defp time_to_wire(nil), do: nil
  defp time_to_wire(time), do: DateTime.to_iso8601(time)

  defp output_to_wire(output) do
    output
    |> Map.take(@output_plain)
    |> Map.merge(%{state: output.state, error: error_to_wire(output.error)})
  end

  defp progress_to_wire(nil), do: nil

  defp progress_to_wire(progress),
    do: progress |> Map.take(@progress_plain) |> Map.put(:state, progress.state)

  defp error_to_wire(nil), do: nil

  defp error_to_wire(error) do
    # Details are for bug reports and may be anything.
    details = if match?({:ok, _}, MessagePack.encode(error.details)), do: error.details, else: %{}
    %{reason: error.reason, message: error.message, details: details}
  end

  @doc "What a job's file says."
  @spec decode(binary()) :: {:ok, t()} | :newer | :damaged
  def decode(bytes) do
    case MessagePack.decode(bytes) do
      {:ok, %{"version" => @version} = map} -> {:ok, read!(map)}
      {:ok, %{"version" => version}} when is_integer(version) and version > @version -> :newer
      _other -> :damaged
    end
  rescue
    # Whatever is not as it was written.
    _error in [ArgumentError, FunctionClauseError, KeyError, MatchError] -> :damaged
  end

  defp read!(%{"id" => id, "name" => name, "source" => source, "outputs" => outputs} = map)
       when is_binary(id) and is_binary(name) and is_binary(source) do
    %{"options" => %{}} = map

    %__MODULE__{
      struct!(__MODULE__, [id: id, kind: nil, name: name, source: source] ++ plain(map, @plain))
      | kind: one_of!(map["kind"], @kinds),
        state: one_of!(map["state"], @states),
        error: error!(map["error"]),
        progress: progress!(map["progress"]),
        outputs: Enum.map(outputs, &output!/1),
        made_at: time!(map["made_at"]),
        started_at: time!(map["started_at"]),
        ended_at: time!(map["ended_at"])
    }
  end

  defp plain(map, names), do: for(name <- names, do: {name, map[Atom.to_string(name)]})

  # Names are compared as texts, so that none becomes an atom.
  defp one_of!(name, atoms), do: Map.fetch!(Map.new(atoms, &{Atom.to_string(&1), &1}), name)

  defp output!(%{"label" => label, "format" => format} = map)
       when is_binary(label) and is_binary(format) do
    %{"options" => %{}, "files" => %{}, "libraries" => %{}, "figures" => %{}} = map
    fields = plain(map, @output_plain)
    state = one_of!(map["state"], @output_states)
    struct!(Output, fields ++ [state: state, error: error!(map["error"])])
  end

  defp progress!(nil), do: nil

  defp progress!(%{"figures" => %{}} = map) do
    struct!(Progress, plain(map, @progress_plain) ++ [state: one_of!(map["state"], @states)])
  end

  defp error!(nil), do: nil
  defp error!(%{"reason" => reason} = map) when is_binary(reason), do: Error.from_wire(map)

  defp time!(nil), do: nil

  defp time!(text) when is_binary(text) do
    {:ok, time, 0} = DateTime.from_iso8601(text)
    time
  end
end
