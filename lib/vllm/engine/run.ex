defmodule VLLM.Engine.Run do
  @moduledoc false
  # One run of a worker's program, from its start until nothing of it is left:
  # the program, the connection to it, its log, and its heartbeat; of an engine over several
  # nodes also what these have of it. Belongs to the process of the worker, which owns the port.

  alias VLLM.Bridge.{Connection, Deltas, Frames, Inbox, Log, Nursery, Program}
  alias VLLM.Engine.{Config, Heartbeat, Rank, Ranks, Table}
  alias VLLM.Error

  @enforce_keys [:table, :slot, :port, :program, :conn, :frames, :log, :heartbeat, :ranks]
  defstruct @enforce_keys ++ [:hello, meeting: %{}, steps: %{}]

  @type t :: %__MODULE__{
          table: Table.t(),
          slot: Table.slot(),
          port: port() | pid(),
          program: Program.t(),
          conn: Connection.t(),
          frames: Frames.t(),
          log: Log.t(),
          heartbeat: Heartbeat.t() | nil,
          ranks: Ranks.t(),
          # What the program says of itself, and the options by which it meets those of other nodes.
          hello: map() | nil,
          meeting: map(),
          steps: Deltas.steps()
        }

  @doc """
  Starts the program of a worker for the calling process. Whatever stands in the way,
  expected or not, is an error of this start.
  """
  @spec start(Table.t(), Table.slot(), Config.t()) :: {:ok, t()} | {:error, Error.t()}
  def start(table, slot, config) do
    with {:ok, program} <- start_program(table, slot, config) do
      conn = Connection.new(program.port, config.options.max_frame, config.options.max_unsent)
      Table.put_run(table, slot, program, conn)
      ranks = Ranks.start(config, Table.index(slot))
      Table.put_ranks(table, slot, ranks)

      {:ok,
       %__MODULE__{
         table: table,
         slot: slot,
         port: program.port,
         program: program,
         conn: conn,
         frames: Frames.new(config.options.max_frame),
         log: Log.new(program.run_dir),
         heartbeat: Heartbeat.new(config.options.hang_timeout),
         ranks: ranks
       }}
    end
  end

  # If the worker process was killed, its port was closed and the program ends by
  # itself; a new one must not start before that.
  defp leave_nothing_behind(table, slot) do
    with %Ranks{} = ranks <- Table.ranks(table, slot), do: Ranks.await_end(ranks)

    with {program, _conn} <- Table.run(table, slot) do
      Program.kill(program)
      Program.clean_up(program)
      Table.delete_run(table, slot)
    end
  end

  defp start_program(table, slot, config) do
    leave_nothing_behind(table, slot)

    if config.start_program do
      config.start_program.(table)
    else
      env = Config.env(config, Table.index(slot))
      mode = if config.options.nursery, do: &Nursery.mode(&1, env)
      Program.start(["-m", "vllm_bridge"], python: config.options.python, env: env, mode: mode)
    end
  rescue
    # Without the exception's message, which may contain secrets.
    error ->
      kind = inspect(error.__struct__)

      {:error,
       Error.new(
         :load_failed,
         "The worker's program could not be started (#{kind}). Run `mix vllm.doctor`."
       )}
  end

  @doc "Notes what the program says of itself."
  @spec greeted(t(), map()) :: t()
  def greeted(run, hello), do: %{run | hello: hello}

  @doc "Takes note of what is told of a rank, or, by its port, of the program here; an error ends the run."
  @spec hear(t(), pid() | port(), Rank.told()) :: {:ok, t()} | {:error, Error.t()}
  def hear(run, teller, told) do
    with {:ok, ranks} <- Ranks.hear(run.ranks, Map.get(run.ranks.keepers, teller, node()), told),
         do: {:ok, %{run | ranks: ranks}}
  end

  @doc "The nodes that a start waits for."
  @spec missing(t()) :: [node()]
  def missing(run), do: Ranks.missing(run.ranks)

  @doc "Has the ranks of other nodes begin; the program is to be loaded then."
  @spec begin(t(), Config.t()) :: {:ok, t()} | {:error, Error.t()}
  def begin(run, config) do
    params = &params(%{run | meeting: &1}, :load, config)

    with {:ok, meeting} <- Ranks.begin(run.ranks, config, run.hello, params),
         do: {:ok, %{run | meeting: meeting}}
  end

  @doc "Sends one of the requests of a start; its answer comes to the calling process."
  @spec ask(t(), :hello | :load, Config.t()) :: {:ok, Connection.request()} | {:error, Error.t()}
  def ask(run, step, config) do
    params = params(run, step, config)
    Connection.request(run.conn, Inbox.new(), Atom.to_string(step), params)
  end

  defp params(run, :hello, _config), do: Connection.hello(run.conn.max_frame)

  defp params(run, :load, config) do
    given = Map.merge(config.engine_options, config.secrets.().engine_options)
    options = Map.merge(run.meeting, given)
    params = %{"model" => config.model, "options" => options}
    devices = Config.devices(config, Table.index(run.slot))

    params =
      if devices, do: Map.put(params, "devices", Enum.map(devices, &to_string/1)), else: params

    case Table.http(run.table) do
      [] -> params
      settings -> Map.put(params, "http", settings)
    end
  end

  @doc "Asks the program to end, tells everyone who waits, and returns when nothing of it is left."
  @spec stop(t() | nil, Error.t()) :: nil
  def stop(nil, _error), do: nil

  def stop(run, error) do
    Table.delete_worker(run.table, run.slot)
    Ranks.stop(run.ranks)
    Program.stop(run.program, fn -> Connection.notify(run.conn, "shutdown", %{}) end)
    close(run, error)
  end

  @doc "Like `stop/2`, but kills the program: it does not react, or has nothing to finish."
  @spec kill(t() | nil, Error.t()) :: nil
  def kill(nil, _error), do: nil

  def kill(run, error) do
    Table.delete_worker(run.table, run.slot)
    Ranks.stop(run.ranks)
    Program.kill(run.program)
    close(run, error)
  end

  @doc "Like `stop/2`, for a program that has already ended."
  @spec close(t() | nil, Error.t()) :: nil
  def close(nil, _error), do: nil

  def close(run, error) do
    Table.delete_worker(run.table, run.slot)
    Ranks.stop(run.ranks)
    Connection.close(run.conn, error)
    Program.clean_up(run.program)
    Ranks.await_end(run.ranks)
    Table.delete_run(run.table, run.slot)
    nil
  end

  @doc "The lines that have been logged since the last call."
  @spec read_log(t()) :: {[String.t()], t()}
  def read_log(run) do
    {lines, log} = Log.read(run.log)
    {lines, %{run | log: log}}
  end

  @doc "The last lines of the log."
  @spec recent(t()) :: [String.t()]
  def recent(run), do: Log.recent(run.log)

  @doc "The frames that are whole with what the port has read; `:too_long` after the last of a broken run."
  @spec frames(t(), binary()) :: {[binary() | :too_long], t()}
  def frames(run, bytes) do
    case Frames.cut(run.frames, bytes) do
      {whole, :too_long} -> {whole ++ [:too_long], run}
      {whole, frames} -> {whole, %{run | frames: frames}}
    end
  end

  @doc "Looks whether the program hangs, and pings it if that cannot be said yet."
  @spec tick(t()) :: {:ok, t()} | {:hung, :worker | :engine}
  def tick(run) do
    case Heartbeat.tick(run.heartbeat, Connection.in_flight(run.conn)) do
      {:idle, heartbeat} ->
        {:ok, %{run | heartbeat: heartbeat}}

      {:ping, n, heartbeat} ->
        Connection.notify(run.conn, "ping", %{"n" => n})
        {:ok, %{run | heartbeat: heartbeat}}

      hung ->
        hung
    end
  end

  @doc "Hands deltas on that came in columns."
  @spec packed_deltas(t(), map()) :: {:ok, t()} | {:malformed, String.t()}
  def packed_deltas(run, params) do
    with {:ok, steps} <- Deltas.columns(run.conn, params, run.steps),
         do: {:ok, %{run | steps: steps}}
  end

  @doc "Records the answer to a ping."
  @spec pong(t(), map()) :: {:ok, t()} | {:malformed, String.t()}
  def pong(%{heartbeat: nil} = run, _params), do: {:ok, run}

  def pong(run, params),
    do:
      with(
        {:ok, heartbeat} <- Heartbeat.pong(run.heartbeat, params),
        do: {:ok, %{run | heartbeat: heartbeat}}
      )
end
