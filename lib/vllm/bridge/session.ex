defmodule VLLM.Bridge.Session do
  @moduledoc false
  # A worker that lives for a few questions: started, greeted, asked, and ended
  # with whoever opened it. (The workers of an engine are VLLM.Engine.Worker's:
  # those are restarted, and serve many.)
  #
  # A process owns the port and hands on the answers; who asks encodes, writes
  # and waits in its own process, by VLLM.Bridge.Connection.

  use GenServer, restart: :temporary

  alias VLLM.Bridge.{Connection, Deadline, ExitStatus, Frames, Log, Program}
  alias VLLM.Error

  @enforce_keys [:pid, :conn]
  defstruct [:pid, :conn, :hello]

  @typedoc "`:hello` is what the worker says of itself (guides/protocol.md, `hello`)."
  @type t :: %__MODULE__{pid: pid(), conn: Connection.t(), hello: map() | nil}

  @type kind :: :engine | :tools | :job

  @max_frame 64 * 1024 * 1024
  @start_timeout 30_000

  # How often what the worker prints is looked at, in ms, where somebody wants to know.
  @log_interval 500

  @doc """
  Gives a session to `fun` and ends it; returns what `fun` does, or the error
  with which it could not be opened. Options are those of `open/2`.
  """
  @spec run(kind(), keyword(), (t() -> result)) :: result | {:error, Error.t()}
        when result: term()
  def run(kind, opts \\ [], fun) do
    with {:ok, session} <- open(kind, opts) do
      try do
        fun.(session)
      after
        close(session)
      end
    end
  end

  @doc """
  Starts a worker and shakes hands with it. It ends with the calling process.

  Options: `:timeout` in milliseconds until it has answered, default 30,000;
  `:python`, the path of the interpreter; `:env`, a map of environment variables on
  top of the BEAM's; `:mode`, as `Program.start/2` takes it; `:on_log`, a function that is given what the worker prints, as a list of lines,
  in the process of the session, before that ends.
  """
  @spec open(kind(), keyword()) :: {:ok, t()} | {:error, Error.t()}
  def open(kind, opts \\ []) do
    {timeout, opts} = Keyword.pop(opts, :timeout, @start_timeout)
    with {:ok, session} <- start(kind, opts), do: greet(session, timeout)
  end

  @doc """
  Starts a worker, as `open/2` does, and leaves the handshake to whoever calls `greet/2`: so that the
  process that it ends with need not wait.
  """
  @spec start(kind(), keyword()) :: {:ok, t()} | {:error, Error.t()}
  def start(kind, opts) do
    case GenServer.start(__MODULE__, {self(), kind, opts}) do
      {:ok, pid} -> {:ok, %__MODULE__{pid: pid, conn: GenServer.call(pid, :conn)}}
      {:error, {:shutdown, error}} -> {:error, error}
    end
  end

  @doc "Shakes hands with a worker that has been started, or ends it."
  @spec greet(t(), timeout()) :: {:ok, t()} | {:error, Error.t()}
  def greet(session, timeout \\ @start_timeout) do
    with {:error, error} <- call(session, "hello", Connection.hello(@max_frame), timeout) do
      close(session)
      {:error, error}
    else
      {:ok, hello} -> {:ok, %{session | hello: hello}}
    end
  end

  @doc """
  The worker's answer to a request. Any process may ask, and several at once.

  After `timeout` milliseconds the request is cancelled and the error is
  `:timeout`. A worker that has died, or broke the protocol and was ended, is the
  error of this request and of all that follow.
  """
  @spec call(t(), String.t(), map(), timeout()) :: {:ok, term()} | {:error, Error.t()}
  def call(%__MODULE__{conn: conn} = session, method, params, timeout) do
    conn
    |> Connection.call(method, params, Deadline.new(timeout))
    |> explained(session, method, timeout)
  end

  @doc """
  Like `call/4`, of a request that says how far it is: `on_progress` is given each of these. It may
  take `timeout` milliseconds, and `patience` from one to the next.
  """
  @spec follow(t(), String.t(), map(), timeout(), timeout(), (map() -> term())) ::
          {:ok, term()} | {:error, Error.t()}
  def follow(%__MODULE__{conn: conn} = session, method, params, timeout, patience, on_progress) do
    conn
    |> Connection.follow(method, params, Deadline.new(timeout), patience, on_progress)
    |> explained(session, method, min(timeout, patience))
  end

  defp explained({:error, %Error{reason: :timeout}}, _session, method, timeout),
    do: {:error, late(method, timeout)}

  defp explained({:error, %Error{reason: :engine_dead} = error}, session, _method, _timeout),
    do: {:error, cause(session.pid) || error}

  defp explained(result, _session, _method, _timeout), do: result

  defp late(method, timeout) do
    Error.new(
      :timeout,
      "The worker did not answer `#{method}` within #{timeout / 1000} seconds. The machine may " <>
        "be busy: try again.",
      %{"method" => method}
    )
  end

  # Who comes after the worker's end is told no more than that.
  defp cause(pid) do
    GenServer.call(pid, :error)
  catch
    :exit, _closed -> nil
  end

  @doc "Ends the session and returns when nothing of its worker is left."
  @spec close(t()) :: :ok
  def close(%__MODULE__{pid: pid}), do: GenServer.stop(pid, :normal, :infinity)

  @doc "Like `close/1`, without asking the worker to end: it is killed. It may have ended before."
  @spec kill(t()) :: :ok
  def kill(%__MODULE__{pid: pid}) do
    GenServer.stop(pid, {:shutdown, :kill}, :infinity)
  catch
    :exit, _ended -> :ok
  end

  @impl true
  def init({owner, kind, opts}) do
    Process.flag(:trap_exit, true)
    Process.monitor(owner)

    case Program.start(program(kind), Keyword.take(opts, [:python, :env, :mode])) do
      {:ok, program} ->
        if opts[:on_log], do: :timer.send_interval(@log_interval, :read_log)

        {:ok,
         %{
           program: program,
           conn: Connection.new(program.port, @max_frame),
           frames: Frames.new(@max_frame),
           log: Log.new(program.run_dir),
           on_log: opts[:on_log],
           error: nil
         }}

      {:error, error} ->
        {:stop, {:shutdown, error}}
    end
  end

  defp program(:engine), do: ["-m", "vllm_bridge"]
  defp program(kind), do: ["-m", "vllm_bridge", Atom.to_string(kind)]

  @impl true
  def handle_call(:conn, _from, state), do: {:reply, state.conn, state}
  def handle_call(:error, _from, state), do: {:reply, state.error, state}

  @impl true
  def handle_info({port, {:data, bytes}}, %{program: %{port: port}} = state) do
    {whole, rest} = Frames.cut(state.frames, bytes)

    case receive_frames(whole, state.conn) do
      {:malformed, reason} -> malformed(state, reason)
      :ok when rest == :too_long -> malformed(state, "a frame that is too long")
      :ok -> {:noreply, %{state | frames: rest}}
    end
  end

  def handle_info({:malformed, port, reason}, %{program: %{port: port}} = state) do
    malformed(state, reason)
  end

  def handle_info({port, {:exit_status, status}}, %{program: %{port: port}} = state) do
    state = read_log(state)
    ended(state, ExitStatus.error(status, Log.recent(state.log)))
  end

  # The guard ended before it could tell a status.
  def handle_info({:EXIT, port, _reason}, %{program: %{port: port}} = state) do
    state = read_log(state)
    Program.kill(state.program)
    details = %{"log" => Log.recent(state.log)}
    ended(state, Error.new(:engine_dead, "The worker and its guard ended.", details))
  end

  def handle_info(:read_log, %{program: program} = state) when program != nil,
    do: {:noreply, read_log(state)}

  def handle_info({:watch, _port, id, _address, pid}, %{error: nil} = state) do
    Connection.watch(state.conn, id, pid)
    {:noreply, state}
  end

  def handle_info({:unwatch, monitor}, state) do
    Connection.unwatch(monitor)
    {:noreply, state}
  end

  def handle_info({{:caller_down, id}, _, :process, _, _}, %{error: nil} = state) do
    _nowhere_counted = Connection.caller_down(state.conn, id)
    {:noreply, state}
  end

  # The process that opened it.
  def handle_info({:DOWN, _monitor, :process, _pid, _reason}, state), do: {:stop, :normal, state}

  # Of the worker that has ended, or the end of its port.
  def handle_info(_message, state), do: {:noreply, state}

  defp receive_frames([], _conn), do: :ok

  defp receive_frames([frame | frames], conn) do
    case Connection.parse(frame) do
      {:response, id, body} ->
        # Nobody waits for the answer to a request that was cancelled.
        _ = Connection.deliver(conn, id, {:response, body})
        receive_frames(frames, conn)

      {:notification, "progress", %{"id" => id} = progress} ->
        Connection.deliver_progress(conn, id, progress)
        receive_frames(frames, conn)

      # None of these kinds of worker tells anything else that nobody asked for.
      {:notification, _method, _params} ->
        receive_frames(frames, conn)

      {:malformed, reason} ->
        {:malformed, reason}
    end
  end

  defp malformed(state, reason) do
    Program.kill(state.program)
    ended(state, Error.new(:protocol, "The worker broke the protocol (#{reason})."))
  end

  defp read_log(state) do
    {lines, log} = Log.read(state.log)
    if state.on_log != nil and lines != [], do: state.on_log.(lines)
    %{state | log: log}
  end

  # Nothing is left of the worker but its run folder.
  defp ended(state, error) do
    Connection.close(state.conn, error)
    Program.clean_up(state.program)
    {:noreply, %{state | program: nil, error: error}}
  end

  @impl true
  def terminate(_reason, %{program: nil}), do: :ok

  def terminate(reason, %{program: program, conn: conn} = state) do
    # Twice, because a worker that is killed leaves no log, and one that ends by itself may print.
    state = read_log(state)

    if reason == {:shutdown, :kill},
      do: Program.kill(program),
      else: Program.stop(program, fn -> Connection.notify(conn, "shutdown", %{}) end)

    read_log(state)
    Connection.close(conn, Error.new(:shutdown, "The worker was ended during the request."))
    Program.clean_up(program)
  end
end
