defmodule VLLM.Server.Acceptor do
  @moduledoc false
  # Takes clients in, each into a process of its own, as long as there is room.

  alias VLLM.OpenAI.Refusal
  alias VLLM.Server.Connection

  # How long to wait where the system has no file left for a connection, in ms.
  @rest 100

  @doc "Takes those in that come to `listening`, below the server's supervisors of these names."
  @spec start_link(pid(), :gen_tcp.socket(), Connection.served()) :: {:ok, pid()}
  def start_link(server, listening, served) do
    Task.start_link(fn ->
      children =
        for {id, pid, _, _} <- Supervisor.which_children(server), into: %{}, do: {id, pid}

      accept(listening, children, served)
    end)
  end

  defp accept(listening, supervisors, served) do
    case :gen_tcp.accept(listening) do
      {:ok, socket} -> take_in(socket, supervisors, served)
      {:error, :closed} -> exit({:shutdown, :closed})
      {:error, _none_left_or_gone_again} -> Process.sleep(@rest)
    end

    accept(listening, supervisors, served)
  end

  # One too many is told so, and where even these are many, has its connection closed.
  defp take_in(socket, supervisors, served) do
    refuse = fn ->
      Connection.turn_away(socket, Refusal.answer(Refusal.too_many_clients()))
    end

    with :full <-
           hand_over(socket, supervisors.clients, fn -> Connection.serve(socket, served) end),
         :full <- hand_over(socket, supervisors.turned_away, refuse),
         do: :gen_tcp.close(socket)
  end

  defp hand_over(socket, supervisor, serve) do
    begin = fn -> receive(do: (:yours -> serve.())) end

    case Task.Supervisor.start_child(supervisor, begin, shutdown: :brutal_kill) do
      {:ok, pid} ->
        # A client that is gone already is noticed there.
        _ = :gen_tcp.controlling_process(socket, pid)
        send(pid, :yours)

      {:error, :max_children} ->
        :full
    end
  end
end
