defmodule VLLM.Job.Lock do
  @moduledoc false
  # Between the BEAMs that share a data folder: one at a time looks which jobs there
  # are and adds one.
  #
  # A BEAM holds it by listening on a name, which the kernel gives to one process
  # only, and takes back when that ends, however it ends. (An abstract socket has no
  # file that could be left.)

  # Between two tries, in ms.
  @pause 5

  # A BEAM that is stopped while it holds the lock does not stop the others for longer, in ms. What a
  # job has made gets its place by a rename, which is refused where something is.
  @patience 5_000

  @doc "What `fun` returns, which runs while no other BEAM holds the lock of this folder."
  @spec exclusively(Path.t(), (() -> result)) :: result when result: term()
  def exclusively(folder, fun) do
    socket = take(name(folder), System.monotonic_time(:millisecond) + @patience)

    try do
      fun.()
    after
      if socket, do: :gen_tcp.close(socket)
    end
  end

  # Names of such sockets are short, and paths may be long.
  defp name(folder), do: <<0, "ex_vllm-", :crypto.hash(:sha256, folder)::binary>>

  defp take(name, until) do
    with {:error, :eaddrinuse} <- :gen_tcp.listen(0, [:local, ifaddr: {:local, name}]),
         true <- System.monotonic_time(:millisecond) < until do
      Process.sleep(@pause)
      take(name, until)
    else
      {:ok, socket} -> socket
      # It is not to be had: too late, or nowhere here.
      _none -> nil
    end
  end
end
