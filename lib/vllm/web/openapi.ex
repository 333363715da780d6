defmodule VLLM.Web.OpenAPI do
  @moduledoc false
  # The description of the admin API, in the form of OpenAPI 3.1, made of the table
  # of its routes.

  alias VLLM.Web.Schemas

  @about """
  The admin API of VLLM for Elixir: engines, models and jobs of one node. What is refused is answered with an error whose \
  reason is one of `VLLM.Error` or of HTTP's own: `forbidden`, `malformed`, `method_not_allowed`, `no_header`, `no_json`, \
  `no_key`, `not_found`, `wrong_origin`.
  """

  @doc "The description of these routes."
  @spec document([VLLM.Web.Routes.route()]) :: map()
  def document(routes) do
    %{
      openapi: "3.1.0",
      info: %{title: "VLLM admin API", version: VLLM.version().ex_vllm, description: @about},
      # Below where the page is.
      servers: [%{url: "../.."}],
      security: [%{key: []}],
      paths:
        routes
        |> Enum.group_by(&path(&1.path))
        |> Map.new(fn {path, of} -> {path, methods(of)} end),
      components: %{
        securitySchemes: %{key: %{type: "http", scheme: "bearer"}},
        schemas: Schemas.answers(),
        responses: %{Error: %{description: "An error.", content: content(:Error)}}
      }
    }
  end

  defp path(path), do: String.replace(path, "...}", "}")

  defp methods(routes), do: Map.new(routes, &{String.downcase(&1.method), operation(&1)})

  defp operation(route) do
    of = %{
      operationId: operation_id(route),
      summary: route.about,
      parameters: parts(route) ++ headers(route) ++ query(route),
      responses: %{
        Integer.to_string(route.status) => answer(route),
        "default" => %{"$ref": "#/components/responses/Error"}
      }
    }

    if route.body,
      do:
        Map.put(of, :requestBody, %{
          required: true,
          content: %{"application/json" => %{schema: route.body}}
        }),
      else: of
  end

  # `POST /api/v1/engines/{id}/stop` is `post_engines_id_stop`.
  defp operation_id(route) do
    "/api/v1/" <> rest = route.path
    parts = Regex.scan(~r/\w+/, rest)
    Enum.join([String.downcase(route.method) | List.flatten(parts)], "_")
  end

  defp parts(route) do
    for [_, name] <- Regex.scan(~r/\{(\w+)/, route.path) do
      %{name: name, in: "path", required: true, schema: %{type: "string", minLength: 1}}
    end
  end

  defp headers(%{method: "DELETE"}) do
    [
      %{
        name: "X-Requested-With",
        in: "header",
        required: true,
        description: "which no form of another page can send",
        schema: %{type: "string", enum: ["vllm"]}
      }
    ]
  end

  defp headers(_route), do: []

  defp query(route) do
    for {name, schema} <- route.query do
      %{name: name, in: "query", required: false, schema: schema}
    end
  end

  defp answer(%{answer: nil, status: 204}), do: %{description: "It is done."}

  defp answer(%{answer: nil}),
    do: %{description: "Events.", content: %{"text/event-stream" => %{schema: %{type: "string"}}}}

  defp answer(%{answer: name}), do: %{description: Atom.to_string(name), content: content(name)}

  defp content(name),
    do: %{"application/json" => %{schema: %{"$ref": "#/components/schemas/#{name}"}}}
end
