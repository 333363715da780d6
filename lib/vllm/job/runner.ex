defmodule VLLM.Job.Runner do
  @moduledoc false
  # Runs one job: takes the steps that its kind says, one after another, each in a
  # worker of its own, keeps the record on the disk, and leaves nothing behind,
  # however it ends.
  #
  # The worker belongs to this process (VLLM.Bridge.Session); another process asks
  # it and waits, so that this one can be told to end at any time.
  #
  # States: `:waiting`, for memory that others hold; `:working`, at a step.

  @behaviour :gen_statem

  require Logger

  alias VLLM.{Data, Error, Python, Telemetry}
  alias VLLM.Bridge.Session
  alias VLLM.Job.{Machine, Owner, Record, Settings, Step, Store, Tally}

  # How often the disk is looked at, and whether another BEAM wants the job to end, in ms.
  @tick 1_000

  # Ticks between two looks at the disk, and between two progresses that are kept on it.
  @seldom 5

  # Bytes of the disk that a job does not take.
  @reserve 64 * 1024 * 1024

  # How long a worker may take to answer at all, in ms: what it imports first is in it.
  @start_timeout 120_000

  # How long a worker may be silent, in ms. It says every five seconds that it is alive, unless it starts an
  # engine: that may take as long as any engine's start, as `load_timeout:` has it by default.
  @patience 300_000
  @load_patience 900_000

  # How long this may take to end everything when the application is stopped, in ms.
  @shutdown 15_000

  # The exit status after SIGKILL.
  @killed 137

  # Lines of the log that an error shows.
  @shown 20

  @typedoc """
  The job, the module of its kind, and the queue, which is told how far it is. `settings` is a function,
  because what it returns has secrets, which no crash report may show.
  """
  @type args :: %{record: Record.t(), kind: module(), settings: Settings.t(), queue: pid()}

  @spec child_spec(args()) :: Supervisor.child_spec()
  def child_spec(args) do
    %{
      id: __MODULE__,
      start: {__MODULE__, :start_link, [args]},
      restart: :temporary,
      shutdown: @shutdown
    }
  end

  @spec start_link(args()) :: :gen_statem.start_ret()
  def start_link(args), do: :gen_statem.start_link(__MODULE__, args, [])

  @doc "Ends the job; the queue is told when nothing is left of it."
  @spec cancel(pid()) :: :ok
  def cancel(pid), do: :gen_statem.cast(pid, :cancel)

  @impl true
  def callback_mode, do: :state_functions

  @impl true
  def init(%{record: record, kind: kind, settings: settings, queue: queue}) do
    Process.flag(:trap_exit, true)
    {:ok, _timer} = :timer.send_interval(@tick, :tick)

    data = %{
      record: %{record | owner: Owner.this(), started_at: Record.now()},
      kind: kind,
      settings: settings,
      queue: queue,
      step: nil,
      session: nil,
      asker: nil,
      oom_kills: nil,
      ticks: 0,
      started_at: System.monotonic_time()
    }

    Telemetry.job_start(about(data.record))
    {:ok, :working, data, {:next_event, :internal, :begin}}
  end

  ## Between two steps

  defp next(data) do
    case data.kind.next(data.record) do
      %Step{} = step -> prepare(step, data)
      :done -> finish(data, :done)
      {:error, error} -> finish(data, {:error, error})
    end
  end

  defp prepare(step, data) do
    data = %{data | step: step}

    with :ok <- before(step),
         :ok <- Machine.check_disk(Data.jobs(), step.disk + @reserve) do
      case lacking(data) do
        nil -> take(data)
        {:error, error} -> failed(data, error)
        why -> wait(data, why)
      end
    else
      {:error, error} -> failed(data, error)
    end
  end

  defp before(%Step{before: nil}), do: :ok
  defp before(%Step{before: fun}), do: fun.()

  # What a step needs that the machine has, but not now.
  defp lacking(%{step: %Step{memory: needed}} = data) do
    {available, total} = Machine.memory()

    cond do
      needed <= available ->
        nil

      needed <= total ->
        "about #{VLLM.Bytes.memory(needed)} of memory, of which #{VLLM.Bytes.memory(available)} " <>
          "are free now: an engine that is stopped makes room"

      true ->
        message =
          "This step needs about #{VLLM.Bytes.memory(needed)} of memory, and the machine has " <>
            "#{VLLM.Bytes.memory(total)} in all. Take a larger machine, or #{less(data)}."

        {:error, Error.new(:out_of_memory, message, %{"needed" => needed, "total" => total})}
    end
  end

  # With what a job needs less memory.
  defp less(%{record: %Record{kind: :quantize}}),
    do: "a format that needs less (`VLLM.Job.estimate/2` tells how much each does)"

  # Which is made in full precision, whatever was trained over.
  defp less(%{step: %Step{name: :merge}}),
    do: "do without `merge: true`: the adapter is there, and is served over its model"

  defp less(%{record: %Record{kind: :finetune}}) do
    "what needs less (`VLLM.Job.estimate/3` tells how much): `load_in_4bit: true`, a smaller " <>
      "`per_device_train_batch_size` or `max_length`, or `gradient_checkpointing: true`"
  end

  defp wait(data, why) do
    record = %{data.record | state: :queued, waiting_for: why}
    data = %{data | record: record} |> keep() |> tell(Record.progress(record))
    {:next_state, :waiting, data}
  end

  defp take(data) do
    data = begun(data)

    case start(data.step, data) do
      {:ok, data} -> {:next_state, :working, data}
      {:error, error} -> failed(data, error)
    end
  end

  defp begun(%{step: step, record: record} = data) do
    record = %{record | state: step.state, waiting_for: nil}

    record =
      if step.output_state,
        do: Record.update_output(record, step.output, &%{&1 | state: step.output_state}),
        else: record

    Store.log(record.id, ["== #{Enum.join([step.name | List.wrap(step.output)], " ")}"])
    tell(keep(%{data | record: record}), Record.progress(record, step, %{}))
  end

  defp start(%Step{run: run}, data) when run != nil, do: {:ok, ask(data, nil, run)}

  defp start(%Step{} = step, data) do
    settings = data.settings.()
    id = data.record.id

    with {:ok, python} <- python(step.at, settings),
         {:ok, session} <-
           Session.start(if(step.at == :tools, do: :tools, else: :job),
             python: python,
             env: Settings.environment(settings),
             on_log: &Store.log(id, &1)
           ) do
      Tally.session(id, session.pid)
      runner = self()
      params = with_token(step, settings)

      question = fn ->
        with {:ok, session} <- Session.greet(session, @start_timeout) do
          Session.follow(session, step.method, params, :infinity, patience(step), fn progress ->
            send(runner, {:progress, self(), progress})
          end)
        end
      end

      {:ok, ask(%{data | oom_kills: Machine.killed()}, session, question)}
    end
  end

  defp patience(%Step{method: "measure"}), do: @load_patience
  defp patience(_step), do: @patience

  defp python(:quantize, %{quantize_python: nil}), do: Python.executable(:quantize)
  defp python(:quantize, %{quantize_python: python}), do: {:ok, python}
  defp python(_serving, %{python: nil}), do: Python.executable()
  defp python(_serving, %{python: python}), do: {:ok, python}

  # Its workers find it in their environment, but for the hub it is an option.
  defp with_token(%Step{params: %{"options" => options} = params, at: :tools}, %{hf_token: token})
       when token != nil,
       do: %{params | "options" => Map.put(options, "hf_token", token)}

  defp with_token(step, _settings), do: step.params

  defp ask(data, session, question) do
    {pid, monitor} = spawn_monitor(fn -> exit({:answer, question.()}) end)
    %{data | session: session, asker: {pid, monitor}}
  end

  ## States

  def working(:internal, :begin, data) do
    with :ok <- Store.open_tmp(data.record.id),
         :ok <- Store.write(data.record) do
      next(data)
    else
      {:error, error} -> finish(data, {:error, error})
    end
  end

  def working(:info, {:progress, asker, wire}, %{asker: {asker, _monitor}} = data),
    do: {:keep_state, tell(data, Record.progress(data.record, data.step, wire))}

  def working(:info, {:DOWN, monitor, :process, _, how}, %{asker: {_, monitor}} = data) do
    data = close(%{data | asker: nil})

    case how do
      {:answer, {:ok, result}} -> answered(data, result)
      {:answer, {:error, error}} -> failed(data, told(error, data))
      _fault -> failed(data, fault(data.step))
    end
  end

  def working(:info, :tick, data) do
    data = %{data | ticks: data.ticks + 1}

    cond do
      Store.cancel_requested?(data.record.id) -> cancelled(data)
      rem(data.ticks, @seldom) != 0 -> {:keep_state, data}
      true -> with_disk(keep(data))
    end
  end

  def working(kind, event, data), do: common(kind, event, data)

  def waiting(:info, :tick, data) do
    cond do
      Store.cancel_requested?(data.record.id) -> cancelled(data)
      lacking(data) == nil -> take(data)
      true -> :keep_state_and_data
    end
  end

  def waiting(kind, event, data), do: common(kind, event, data)

  defp common(:cast, :cancel, data), do: cancelled(data)

  # What is late: of a step that has ended, or of a port.
  defp common(:info, _message, _data), do: :keep_state_and_data

  # A step that fills the disk takes it from everybody.
  defp with_disk(data) do
    case Machine.check_disk(Data.jobs(), @reserve) do
      :ok -> {:keep_state, data}
      {:error, error} -> failed(kill(data), error)
    end
  end

  ## After a step

  defp answered(data, result) do
    case data.kind.done(data.record, data.step, result) do
      {:ok, record} -> next(keep(%{data | record: record}))
      {:error, error} -> failed(data, error)
    end
  end

  defp failed(data, error) do
    Store.log(data.record.id, ["== failed: #{error.message}"])

    case data.kind.failed(data.record, data.step, error) do
      {:ok, record} -> next(keep(%{data | record: record}))
      {:error, error} -> finish(data, {:error, error})
    end
  end

  # What a step's error is to users: of a worker that has ended, how and with which last words.
  defp told(%Error{reason: :engine_dead, details: details} = error, %{step: step} = data) do
    # Of a measurement it may be vLLM's process below the worker, which lives to tell.
    killed? = details["status"] == @killed or step.method == "measure"

    if killed? and Machine.killed() != data.oom_kills,
      do: Error.new(:out_of_memory, out_of_memory(data), %{"log" => details["log"] || []}),
      else: step_died(data, error)
  end

  defp told(error, _data), do: error

  defp out_of_memory(data) do
    "The system has killed the process of the step `#{data.step.name}` for want of memory. Stop engines " <>
      "that hold it and retry the job; or take a larger machine, or #{less(data)}."
  end

  defp step_died(%{step: step} = data, error) do
    log = error.details["log"] || []

    how =
      case error.details["status"] do
        nil ->
          "ended. #{error.message}"

        @killed ->
          "was killed by signal 9 (SIGKILL): by somebody, or by the system for want of memory, which " <>
            "`dmesg` tells. If so, stop engines and whatever else holds it, or take #{less(data)}."

        status when status > 128 ->
          "was killed by signal #{status - 128}."

        status ->
          "ended with status #{status}."
      end

    last = for line <- Enum.take(log, -@shown), do: "\n  " <> line

    message =
      "The process of the step `#{step.name}` #{how} A retry of the job begins with this step; " <>
        "`VLLM.Job.logs(#{inspect(data.record.id)})` has all that it printed." <>
        if(last == [], do: "", else: " Its last lines:#{last}")

    Error.new(:step_died, message, %{"step" => Atom.to_string(step.name), "log" => log})
  end

  defp fault(step) do
    message =
      "A fault in this library ended the step `#{step.name}`; the application's log tells more."

    Error.new(:internal, message, %{"step" => Atom.to_string(step.name)})
  end

  ## Ends

  defp cancelled(data) do
    data = kill(data)
    {:stop, :normal, ended(data, Record.cancelled(data.record))}
  end

  defp finish(data, :done) do
    Store.drop_kept(data.record.id)
    {:stop, :normal, ended(data, Record.ended(data.record, :done, nil))}
  end

  defp finish(data, {:error, error}),
    do: {:stop, :normal, ended(data, Record.ended(data.record, :failed, error))}

  defp kill(%{asker: asker} = data) do
    with {pid, monitor} <- asker do
      Process.demonitor(monitor, [:flush])
      Process.exit(pid, :kill)
    end

    close(%{data | asker: nil})
  end

  defp close(%{session: nil} = data), do: data

  # It is not asked to end: whatever it had to do is done, or is not wanted.
  defp close(%{session: session} = data) do
    Session.kill(session)
    Tally.session(data.record.id, nil)
    %{data | session: nil}
  end

  defp ended(data, record) do
    Store.clean(record.id)
    keep_last(record)
    Telemetry.job_end(data.started_at, about(record), record.state, record.error)
    %{data | record: record}
  end

  @impl true
  def terminate(_reason, _state, data) do
    # Stopped from outside, or by a fault of its own.
    unless Record.ended?(data.record) do
      data = kill(data)
      ended(data, Record.interrupted(data.record))
    end

    :ok
  end

  ## What others see

  defp keep(data) do
    Tally.update(data.record)

    # What cannot be kept now is kept at the next change, and the job itself tells of a full disk.
    with {:error, error} <- Store.write(data.record), do: Logger.warning(error.message)
    data
  end

  # In memory where the disk does not take it. The queue tells it once this process has ended.
  defp keep_last(record) do
    Tally.update(record)

    with {:error, error} <- Store.write(record) do
      Logger.warning("The end of the job #{record.id} could not be kept: #{error.message}")
    end
  end

  defp tell(data, progress) do
    record = %{data.record | progress: progress}
    Tally.update(record)
    GenServer.cast(data.queue, {:progress, record})
    Telemetry.job_progress(data.started_at, about(record), progress)
    %{data | record: record}
  end

  defp about(record), do: Map.take(record, [:id, :kind, :name, :source])
end
