defmodule VLLM.Bridge do
  @moduledoc false
  # The bridge between Elixir and Python workers. Its parts: Program (the port
  # program and its guard), Connection (requests and answers), Writer (writing
  # to a full pipe), Log (what workers print) and MessagePack (the format).

  alias VLLM.Bridge.{Connection, Deadline, Inbox, Log, Program}
  alias VLLM.Error

  @max_frame 1024 * 1024

  @doc """
  Starts a worker, shakes hands and ends it: whether the two sides can talk.

  The result is what the worker says of itself (guides/protocol.md, `hello`).
  Options: `:timeout` in milliseconds, default 30,000; `:python`, the path of
  the interpreter.
  """
  @spec handshake(keyword()) :: {:ok, map()} | {:error, Error.t()}
  def handshake(opts \\ []) do
    # In a process of its own: frames are not to land in the caller's mailbox.
    Task.await(Task.async(fn -> shake_hands(opts) end), :infinity)
  end

  defp shake_hands(opts) do
    Process.flag(:trap_exit, true)
    deadline = Deadline.new(Keyword.get(opts, :timeout, 30_000))

    with {:ok, program} <- Program.start(["-m", "vllm_bridge"], Keyword.take(opts, [:python])) do
      conn = Connection.new(program.port, @max_frame)
      hello = %{"protocol" => 1, "max_frame" => @max_frame}

      result =
        with {:ok, _request} <- Connection.request(conn, Inbox.new(), "hello", hello) do
          answer(program, deadline)
        end

      unless match?({:error, %Error{reason: :engine_dead}}, result) do
        Program.stop(program, fn -> Connection.notify(conn, "shutdown", %{}) end)
      end

      Program.clean_up(program)
      result
    end
  end

  defp answer(%{port: port} = program, deadline) do
    receive do
      {^port, {:data, frame}} ->
        case Connection.parse(frame) do
          {:response, _id, body} -> decoded(Connection.decode_response(body))
          {:notification, _, _} -> answer(program, deadline)
          {:malformed, reason} -> decoded({:error, {:malformed, reason}})
        end

      {^port, {:exit_status, status}} ->
        {_, log} = Log.read(Log.new(program.run_dir))
        {:error, ended(status, Log.recent(log))}
    after
      Deadline.remaining(deadline) ->
        {:error, Error.new(:timeout, "The worker did not answer in time.")}
    end
  end

  defp decoded({:error, {:malformed, reason}}) do
    {:error, Error.new(:protocol, "The worker broke the protocol (#{reason}).")}
  end

  defp decoded(result), do: result

  # Exit statuses with a meaning of their own; see guides/protocol.md.
  @engine_died 70
  @not_installed 78

  @doc "The error for a program that ended with a status, and with these last lines in its log."
  @spec ended(non_neg_integer(), [String.t()]) :: Error.t()
  def ended(@not_installed, log) do
    Error.new(
      :vllm_not_installed,
      "This Python lacks the packages that a worker needs. Run `mix vllm.setup`, or have " <>
        "`python:` name an interpreter that has vLLM.",
      %{"log" => log}
    )
  end

  def ended(@engine_died, log) do
    Error.new(
      :engine_dead,
      "vLLM's engine ended under the worker. `details[\"log\"]` has its last lines.",
      %{"status" => @engine_died, "log" => log}
    )
  end

  def ended(status, log) do
    how =
      if status > 128,
        do: "was killed by signal #{status - 128}",
        else: "ended with status #{status}"

    hint =
      if status == 137,
        do: "The system may have killed it for want of memory (see `dmesg`).",
        else: "`details[\"log\"]` has its last lines."

    Error.new(:engine_dead, "The worker #{how}. #{hint}", %{"status" => status, "log" => log})
  end
end
