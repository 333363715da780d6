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

  The server is `httpd` of OTP's own `:inets`; where releases are made, list it in `extra_applications`.
  It speaks plain HTTP/1.1, for this machine or behind a proxy that has the certificates.

  ## Options

  #{VLLM.Options.docs(VLLM.Options.server())}
  """

  alias VLLM.{Error, OpenAI, Options}

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
         :ok <- check_inets() do
      case :inets.start(:httpd, config(known, core), :stand_alone) do
        {:ok, pid} -> {:ok, pid}
        {:error, _reason} -> {:error, not_started(known)}
      end
    end
  end

  @doc """
  Where a server is to be reached, as the `base_url` of a client.

      {:ok, server} = VLLM.Server.start_link(models: [MyApp.LLM], port: 0)
      VLLM.Server.url(server)
      #=> "http://127.0.0.1:40123/v1"
  """
  @spec url(pid()) :: String.t()
  def url(server) do
    [{{:httpd_instance_sup, ip, port, _profile}, _, _, _}] = Supervisor.which_children(server)
    host = :inet.ntoa(ip)
    host = if tuple_size(ip) == 8, do: "[#{host}]", else: host
    "http://#{host}:#{port}/v1"
  end

  defp check_inets do
    if Code.ensure_loaded?(:httpd) do
      :ok
    else
      {:error,
       Error.new(
         :unsupported,
         "VLLM.Server needs OTP's application `:inets`, which is not here. List it in " <>
           "`extra_applications` of your mix.exs; on Debian the package is `erlang-inets`.",
         %{}
       )}
    end
  end

  # What httpd wants of folders it gets: none of its own modules is used, which would read them.
  defp config(options, core) do
    [
      port: options.port,
      bind_address: options.ip,
      ipfamily: if(tuple_size(options.ip) == 8, do: :inet6, else: :inet),
      server_name: 'vllm',
      server_root: :code.root_dir(),
      document_root: :code.root_dir(),
      server_tokens: :none,
      modules: [VLLM.Server.Handler],
      max_clients: options.max_connections,
      # Smaller bodies come in one piece. Sizes are the handler's affair: httpd's own limit crashes it where
      # it is met to the byte.
      max_client_body_chunk: 65_536,
      customize: VLLM.Server.Headers,
      vllm: %{
        core: core,
        hosts: VLLM.Server.Hosts.new(options),
        max_body_bytes: options.max_body_bytes
      }
    ]
  end

  # Of all that may be the matter httpd tells only that it did not start.
  defp not_started(options) do
    address = options.ip |> :inet.ntoa() |> to_string()

    Error.new(
      :invalid_option,
      "The server cannot listen on #{address}, port #{options.port}. Something else does, or the address " <>
        "is none of this machine's, or the port is one that only root may take. Give it another `port:` or " <>
        "`ip:`.",
      %{"option" => "port"}
    )
  end
end
