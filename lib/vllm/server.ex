defmodule VLLM.Server do
  @moduledoc """
  Serves engines over HTTP, as OpenAI's API: vLLM's own, on the engines of this application.

      children = [
        {VLLM, name: MyApp.LLM, model: "/models/llama"},
        {VLLM.Server, models: [MyApp.LLM], port: 8000, api_keys: [System.fetch_env!("LLM_KEY")]}
      ]

  Then any client of OpenAI's API talks to it:

      curl http://localhost:8000/v1/chat/completions -H "Authorization: Bearer $LLM_KEY" \\
        -H "Content-Type: application/json" \\
        -d '{"model": "/models/llama", "messages": [{"role": "user", "content": "Hello!"}]}'

  Requests over HTTP and calls of `VLLM` share the engine, its batch, and its guarantees: limits, deadlines,
  replicas, draining, restarts. A client that goes has its request aborted at once, and one that reads slowly
  slows down nobody else. guides/serving.md has the rest: what is served and what is not, keys, proxies,
  and Phoenix, where `VLLM.Plug` does the same in your own endpoint.

  The server needs no package. It speaks plain HTTP/1.1, for this machine or behind a proxy that has the
  certificates.

  ## Options

  #{VLLM.Options.docs(VLLM.Options.server())}
  """

  use Supervisor

  alias VLLM.{Error, OpenAI, Options}
  alias VLLM.OpenAI.Models
  alias VLLM.Server.{Acceptor, Hosts}

  # How long a client may be connected without a request, may take for each piece of one, and to read what
  # waits for it, in ms.
  @idle 150_000
  @patience 60_000
  @send_timeout 60_000

  # How many clients may wait to be taken in, and how many be told that they are too many.
  @backlog 1024
  @turned_away 64

  @doc """
  The child spec for a supervision tree. Raises `VLLM.Error` for options that are wrong.

      iex> VLLM.Server.child_spec(models: [MyApp.LLM], port: 8080).id
      {VLLM.Server, 8080}
  """
  @spec child_spec(keyword() | map()) :: Supervisor.child_spec()
  def child_spec(options) do
    known = options |> Options.only(Options.server()) |> Error.bang!()
    _core = known |> OpenAI.new(nil) |> Error.bang!()
    # Not the options themselves: a supervisor's reports show what a child was started with.
    start = fn -> start_link(options) end
    %{id: {__MODULE__, known.port}, start: {__MODULE__, :start_child, [start]}, type: :supervisor}
  end

  @doc false
  def start_child(start), do: start.()

  @doc """
  Starts a server that ends with the calling process; see the module's docs for the options. Errors are
  `:invalid_option`, also where the port is taken.
  """
  @spec start_link(keyword() | map()) :: {:ok, pid()} | {:error, Error.t()}
  def start_link(options) do
    with {:ok, known} <- Options.only(options, Options.server()),
         {:ok, core} <- OpenAI.new(known, make_ref()),
         {:ok, listening} <- listen(known),
         :ok = Models.announce(core.models),
         {:ok, server} <- Supervisor.start_link(__MODULE__, {known, core, listening}) do
      # It is closed with the server.
      :ok = :gen_tcp.controlling_process(listening, server)
      {:ok, server}
    end
  end

  @impl Supervisor
  def init({known, core, listening}) do
    {:ok, address} = :inet.sockname(listening)

    served = %{
      core: core,
      hosts: Hosts.new(known),
      max_body_bytes: known.max_body_bytes,
      idle: @idle,
      patience: @patience
    }

    children = [
      connections(:clients, known.max_connections),
      connections(:turned_away, @turned_away),
      %{
        id: {Acceptor, address},
        start: {Acceptor, :start_link, [self(), listening, served]},
        shutdown: :brutal_kill
      }
    ]

    Supervisor.init(children ++ preparing(core.models), strategy: :one_for_all)
  end

  # Engines that run already are asked once, while others are served.
  defp preparing(models) do
    for entry <- Enum.uniq(models) do
      Supervisor.child_spec({Task, fn -> Models.prepare(entry) end}, id: {:preparing, entry})
    end
  end

  defp connections(id, most),
    do: Supervisor.child_spec({Task.Supervisor, max_children: most}, id: id)

  @doc """
  Where a server is to be reached, as the `base_url` of a client.

      {:ok, server} = VLLM.Server.start_link(models: [MyApp.LLM], port: 0)
      VLLM.Server.url(server)
      #=> "http://127.0.0.1:40123/v1"
  """
  @spec url(pid()) :: String.t()
  def url(server) do
    [{ip, port}] =
      for {{Acceptor, address}, _, _, _} <- Supervisor.which_children(server), do: address

    host = :inet.ntoa(ip)
    host = if tuple_size(ip) == 8, do: "[#{host}]", else: host
    "http://#{host}:#{port}/v1"
  end

  defp listen(options) do
    socket_options = [
      :binary,
      if(tuple_size(options.ip) == 8, do: :inet6, else: :inet),
      ip: options.ip,
      active: false,
      reuseaddr: true,
      backlog: @backlog,
      # What is written is sent, and a client that is gone without a word is noticed in the end.
      nodelay: true,
      keepalive: true,
      send_timeout: @send_timeout,
      send_timeout_close: true
    ]

    with {:error, reason} <- :gen_tcp.listen(options.port, socket_options),
         do: {:error, not_started(options, reason)}
  end

  defp not_started(options, reason) do
    address = options.ip |> :inet.ntoa() |> to_string()

    Error.new(
      :invalid_option,
      "The server cannot listen on #{address}, port #{options.port}: #{:inet.format_error(reason)}. " <>
        why(reason),
      %{"option" => "port"}
    )
  end

  defp why(:eaddrinuse), do: "Something else does. Give it another `port:` or `ip:`."
  defp why(:eaddrnotavail), do: "The machine has no such address. Give it another `ip:`."
  defp why(:eacces), do: "Only root may take that port. Give it another `port:`."
  defp why(_other), do: "Give it another `port:` or `ip:`."
end
